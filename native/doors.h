// Names of the functions that Python finds in the library, one for each level: slingshot_attend_avx2, ...
#pragma once

#define SLINGSHOT_DOOR_OF(name, level) slingshot_##name##_##level
#define SLINGSHOT_DOOR_AT(name, level) SLINGSHOT_DOOR_OF(name, level)
#define DOOR(name) SLINGSHOT_DOOR_AT(name, LEVEL)
