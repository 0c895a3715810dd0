"""What bounds quantized products in tile registers on this processor: nanoseconds per sum of 16 by 16 over a block of 32 values.

    .venv/bin/python benchmarks/amx_limits.py

Loops of single instructions over the first cache, compiled with c++ (GCC 11 or later), for a machine with AMX. CPU time of one
thread, least of five runs.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

_PROGRAM = r"""
#include <cstdint>
#include <cstdio>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double seconds() { timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
struct alignas(64) Shapes { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; };
alignas(4096) static int8_t a[8192], b[8192];
alignas(4096) static int32_t sums[4096], scales[16];
template <typename F> void time(const char* name, const F& four) {
  double best = 1;
  for (int run = 0; run < 5; run++) {
    const double begun = seconds();
    for (int i = 0; i < 200000; i++) four(a + (i & 3) * 2048, b + (i & 3) * 2048, sums + (i & 1) * 1024, sums + (~i & 1) * 1024);
    const double took = (seconds() - begun) / 800000 * 1e9;
    best = took < best || run == 0 ? took : best;
  }
  printf("| %s | %.1f |\n", name, best);
}
int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 1;
  Shapes shapes;
  for (int i = 0; i < 8; i++) shapes.rows[i] = i < 6 ? 16 : 8, shapes.bytes[i] = i == 4 || i == 5 ? 32 : 64;
  __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
#define LOOP(name, text) time(name, [](const int8_t* a, const int8_t* b, int32_t* to, int32_t* from) { \
    __asm__ volatile(text : : "r"(a), "r"(b), "r"(32L), "r"(64L), "r"(to), "r"(from), "r"(scales) : "memory", VECTORS); });
LOOPS
}
"""

_LOAD_A, _LOAD_B = "tileloadd {at}(%0,%2,1), %%tmm{to}", "tileloadd {at}(%1,%3,1), %%tmm{to}"


def load(matrix: str, at: int, to: int) -> str:
    return (_LOAD_A if matrix == "a" else _LOAD_B).format(at=at, to=to)


def load_both(which: int) -> list[str]:
    return [load("a", 1024 * which, 4 + which), load("b", 1024 * which, 6 + which)]


def store(which: int, at: int) -> str:
    return f"tilestored %%tmm{which}, {at}(%4,%3,1)"


def dot(which: int, a: int, b: int) -> str:
    return f"tdpbssd %%tmm{b}, %%tmm{a}, %%tmm{which}"


def added(quarter: int) -> list[str]:
    """The sums of a block, converted, times scales, onto totals."""
    lines = []
    for i in range(16):
        lines += [
            f"vmulps {4 * i}(%6)%{{1to16%}}, %%zmm31, %%zmm{24 + i % 4}",
            f"vcvtdq2ps {1024 * quarter + 64 * i}(%5), %%zmm{16 + i % 4}",
            f"vfmadd231ps %%zmm{24 + i % 4}, %%zmm{16 + i % 4}, %%zmm{i}",
        ]
    return lines


def kind(instruction: str) -> list[str]:
    """As many operations of one kind, on registers."""
    return [f"{instruction} %%zmm30, %%zmm31, %%zmm{i % 24}" for i in range(48)]


def loops() -> dict[str, list[str]]:
    """Four sums each."""
    order = [(0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)]
    loads = [[load("a", 0, 4), load("b", 0, 6)], [load("b", 1024, 7)], [load("a", 1024, 5)], []]
    square = [[*loads[i], store(i, 1024 * i), f"tilezero %%tmm{i}", dot(*order[i])] for i in range(4)]
    single = [[*load_both(i % 2), f"tilezero %%tmm{i % 2}", dot(i % 2, 4 + i % 2, 6 + i % 2), store(1 - i % 2, 1024 * i)] for i in range(4)]
    vectors = [added(i) for i in range(4)]

    def joined(*parts: list[list[str]]) -> list[str]:
        return [line for i in range(4) for part in parts for line in part[i]]

    return {
        "TDPBSSD alone": [dot(*one) for one in order],
        "tile loads, TDPBSSD and stores, two by two tiles": joined(square),
        "48 operations on vectors, no tile instructions": joined(vectors),
        "48 operations on vectors beside tile loads alone": joined(loads, vectors),
        "48 multiplications": joined([kind("vmulps")] * 4),
        "48 multiplications beside tile loads": joined(loads, [kind("vmulps")] * 4),
        "48 additions": joined([kind("vaddps")] * 4),
        "48 additions beside tile loads": joined(loads, [kind("vaddps")] * 4),
        "all of one sum, one by one tile": joined(single, vectors),
        "all of one sum, two by two tiles": joined(square, vectors),
    }


def main() -> None:
    vectors = ", ".join(f'"zmm{i}"' for i in range(32))
    newline = chr(92) + "n"
    lines = [f'  LOOP("{name}", ' + " ".join(f'"{line}{newline}"' for line in text) + ")" for name, text in loops().items()]
    source = _PROGRAM.replace("LOOPS", "\n".join(lines)).replace("VECTORS", vectors)
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "limits.cc"
        program.write_text(source)
        flags = ["-std=c++17", "-O2", "-mavx512f", "-mamx-tile", "-mamx-int8"]
        subprocess.run(["c++", *flags, str(program), "-o", str(program.with_suffix(""))], check=True)
        print("| | ns |\n|---|---|", flush=True)
        subprocess.run([str(program.with_suffix(""))], check=True)


if __name__ == "__main__":
    main()
