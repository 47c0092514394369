// Names of the functions that Python finds in the library, one for each level: slingshot_attend_avx2, ...
#pragma once

#define SLINGSHOT_DOOR_OF(name, level) slingshot_##name##_##level
#define SLINGSHOT_DOOR_AT(name, level) SLINGSHOT_DOOR_OF(name, level)
// The rest of the library is not to be seen from outside.
#define DOOR(name) __attribute__((visibility("default"))) SLINGSHOT_DOOR_AT(name, LEVEL)
