// A thread's tile registers while it works for us: all 16 rows of 64 bytes. What another library had configured comes
// back at the end.
#pragma once

#include "product.h"

namespace slingshot {
namespace LEVEL {

class TileRegisters {
  public:
#if defined(__AMX_BF16__)
    TileRegisters() {
        _tile_storeconfig(before_);
        configure_tiles();
    }
    ~TileRegisters() { _tile_loadconfig(before_); }
    TileRegisters(const TileRegisters&) = delete;

  private:
    alignas(64) unsigned char before_[64];
#else
    TileRegisters() {}
    ~TileRegisters() {}
#endif
};

}  // namespace LEVEL
}  // namespace slingshot
