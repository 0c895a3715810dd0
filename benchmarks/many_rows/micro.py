import ctypes, os, sys, time, signal
import torch
P = ctypes.c_void_p
dev = "cuda"
def stream(): return P(torch.cuda.current_stream().cuda_stream)
def ptr(t): return P(t.data_ptr()) if t is not None else None
def packed(lib, bits, block, N, K, count=1):
    n = lib.many_bytes(bits, block, N, K)
    raw = torch.randint(0, 256, (count * n,), dtype=torch.uint8, device=dev)
    panels = (N + 15) // 16; pb = n // panels; blocks = (K + block - 1) // block
    view = raw.view(count * panels, pb); group = 128 + 4 * block * 16 * bits // 8
    for i in range((blocks + 3) // 4):
        view[:, i * group:i * group + 128] = (torch.randn(count * panels, 64, device=dev) * 0.01).half().view(torch.uint8).view(count * panels, 128)
    return raw
def timed(fs):
    fs[0](); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for f in fs: f()
    best = 1e9
    for _ in range(5):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); b.synchronize(); best = min(best, a.elapsed_time(b))
    return best * 1e3 / len(fs)
def load():
    lib = ctypes.CDLL(os.path.abspath("libbench.so")); lib.many_name.restype = ctypes.c_char_p; lib.many_bytes.restype = ctypes.c_long
    torch.manual_seed(0); return lib
def arranged(lib, bits, x, columns):
    M, K = x.shape; y = torch.zeros((M + 127) // 128 * 128, (K + 127) // 128 * 128, dtype=torch.half, device=dev)
    lib.many_arrange(bits, ptr(x), None, ptr(y), M, K, columns, stream()); return y
def rule(tiles, units, M, sharing):
    s, most = 1, 200 if M <= 64 else 132
    while s * 2 * sharing <= 8 and tiles * s * 2 <= most and s * 4 <= units: s *= 2
    return s
def products(sharings):
    lib = load()
    vs = [(i, lib.many_bits(i), lib.many_columns(i), lib.many_sharing(i), lib.many_name(i).decode()) for i in range(lib.many_variants())]
    vs = [v for v in vs if v[3] in sharings]
    good = set()
    for i, bits, cols, sh, name in vs:
        bad = 0
        for N, K, block in ((2560, 2560, 32), (1024, 416, 32), (296, 40, 32), (2080, 1024, 128)):
            w = packed(lib, bits, block, N, K); d = torch.empty(N, K, dtype=torch.half, device=dev)
            lib.many_dequantize(ptr(w), bits, block, N, K, ptr(d), stream())
            for M in (9, 100, 200):
                x = torch.randn(M, K, device=dev).half(); xa = arranged(lib, bits, x, cols if sh > 1 else 0); want = x.double() @ d.double().T
                for s in (1, 2, 8 // sh):
                    for sw in (0, 1):
                        if sw and N % 32: continue
                        H = N // 2 if sw else N
                        ref = torch.nn.functional.silu(want[:, :H]) * want[:, H:] if sw else want
                        y = torch.full((M, H), float("nan"), dtype=torch.half, device=dev)
                        lib.many_run(i, sw, ptr(w), bits, block, N, K, ptr(xa), None, ptr(y), M, s, stream())
                        e = ((y.double() - ref).norm() / ref.norm()).item()
                        if not e < 1e-3: bad += 1; print("BAD", name, N, K, block, M, s, sw, e, flush=True) if bad < 3 else None
        print("right" if not bad else f"WRONG {bad}", name, flush=True)
        if not bad: good.add(i)
    for label, N, K, sw in (("down", 2560, 9216, 0), ("o", 2560, 4096, 0), ("qkvz", 12288, 2560, 0), ("swiglu", 18432, 2560, 1), ("head", 248320, 2560, 0), ("swiglu .8B", 7168, 1024, 1)):
        for bits in (4, 8):
            if bits == 8 and label not in ("swiglu", "down"): continue
            one = lib.many_bytes(bits, 32, N, K); ws = [packed(lib, bits, 32, N, K) for _ in range(max(2, min(12, (150 << 20) // one)))]
            half = [torch.randn(N, K, dtype=torch.half, device=dev) for _ in range(max(1, min(8, (150 << 20) // (N * K * 2))))]
            for M in (16, 32, 64, 128, 256):
                x = torch.randn(M, K, device=dev).half(); y = torch.empty(M, N, dtype=torch.half, device=dev); out = []
                c = timed([lambda h=h: torch.mm(x, h.T, out=y) for h in half])
                for i, b, cols, sh, name in vs:
                    if b != bits or i not in good or "general 1" in name or (cols != max(16, M) if M < 128 else cols != 128): continue
                    xa = arranged(lib, bits, x, cols if sh > 1 else 0)
                    tiles, units = (N // 2 // 64 if sw else N // 128), K // 128
                    r = rule(tiles, units, M, sh)
                    for s in sorted({r, max(1, r // 2), min(8 // sh, r * 2)}):
                        out.append((timed([lambda w=w: lib.many_run(i, sw, ptr(w), bits, 32, N, K, ptr(xa), None, ptr(y), M, s, stream()) for w in ws]), f"share {sh} splits {s}" + "*" * (s == r)))
                out.sort(); print(f"{label} int{bits} M {M}: cublas fp16 {c:.1f} | " + "; ".join(f"{t:.1f} {n}" for t, n in out[:6]), flush=True)
def experts():
    lib = load(); moe = ctypes.CDLL(os.path.abspath("libmoe.so")); moe.moe_space.restype = ctypes.c_long
    for E, K, H, I, T, block in ((16, 4, 64, 32, 1030, 32), (256, 8, 256, 48, 300, 32), (64, 8, 512, 128, 257, 128), (256, 8, 2048, 512, 512, 32), (256, 8, 2048, 512, 1024, 32), (256, 8, 2048, 512, 2048, 32), (256, 8, 2048, 512, 256, 32), (256, 8, 2048, 512, 128, 32), (256, 8, 2048, 512, 64, 32)):
        up, down = packed(lib, 4, block, 2 * I, H, E), packed(lib, 4, block, H, I, E)
        x, logits = torch.randn(T, H, device=dev).half(), torch.randn(T, E, device=dev).half()
        space = torch.empty(moe.moe_space(T, H, I, E, K), dtype=torch.uint8, device=dev).fill_(255)
        def go(many, y): return moe.moe_run(many, ptr(up), ptr(down), 4, block, T, H, I, E, K, ptr(x), ptr(logits), ptr(y), ptr(space), stream())
        old, new = torch.zeros(T, H, dtype=torch.half, device=dev), torch.full((T, H), float("nan"), dtype=torch.half, device=dev)
        go(0, old); space.fill_(255); go(1, new); torch.cuda.synchronize()
        e = ((new.double() - old.double()).norm() / old.double().norm()).item()
        times = [timed([lambda: go(m, old)] * 3) for m in (0, 1)] if H == 2048 else []
        print(f"experts {K} of {E}, {H}/{I}, block {block}, {T} tokens: difference {e:.2e} {'BAD' if not e < 2e-3 else ''} us old, new: {[round(t, 1) for t in times]}", flush=True)
jobs = {"alone": lambda: products((1,)), "experts": experts, "shared": lambda: products((1, 2, 4))}
for name in sys.argv[1:]:
    begun = time.time(); pid = os.fork()
    if pid == 0:
        signal.alarm(int(os.environ.get("EACH", 8))); jobs[name](); sys.stdout.flush(); os._exit(0)
    status = os.waitpid(pid, 0)[1]; print(f"-- {name}: status {status}, {time.time() - begun:.1f} s", flush=True)
