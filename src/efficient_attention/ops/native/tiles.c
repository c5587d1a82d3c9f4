/* Tiles need the leave of the system, as threads that use them have more to save. */
#include "tiles.h"

#ifdef HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>

enum { ASK_FOR = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */

int may_use_tiles;

__attribute__((constructor)) static void ask(void) { may_use_tiles = syscall(SYS_arch_prctl, ASK_FOR, TILE_DATA) == 0; }
#endif
