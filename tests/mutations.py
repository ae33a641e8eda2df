"""Does a test notice when a formula is wrong? Flips a sign, drops a root or shifts a time in each, one at a time.

    python -m tests.mutations [WORDS]        all of them, or those whose file or line holds one of the words

Each mutation is made in a copy of the tree, where the tests of its file run until the first that fails. What no test
notices is told at the end, and the exit status is 1. About 20 minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# of each file: the tests that are to notice, the quickest first; then pairs of what stands there and what is put there
FILES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "ldm/noise.py": ("noise weightings solvers sampling denoiser matrix likelihood", [
        ("torch.linspace(start, end, steps,", "torch.linspace(start, end, steps + 1,"),
        ("steps, dtype=torch.float64) ** 2", "steps, dtype=torch.float64)"),
        ("(u + _COSINE_OFFSET)", "(u - _COSINE_OFFSET)"),
        ("* math.pi / 2) ** 2", "* math.pi / 2)"),
        ("torch.sigmoid(3 - 6 * u)", "torch.sigmoid(3 - 5 * u)"),
        ("f = torch.sigmoid(3 - 6 * u) - torch", "f = torch.sigmoid(3 - 6 * u) + torch"),
        ("alpha = torch.exp(log_abar / 2)\n", "alpha = torch.exp(log_abar)\n"),
        ("(alpha - alpha[-1]) *", "(alpha + alpha[-1]) *"),
        ("return 2 * moved.log()", "return moved.log()"),
        ("position = t * self.steps", "position = t * self.steps - 1"),
        ("return torch.exp(log_abar / 2), torch", "return torch.exp(log_abar), torch"),
        ("torch.sqrt(-torch.expm1(log_abar))", "-torch.expm1(log_abar)"),
        ("table[k] + 2 * torch.log1p(-share)", "table[k] + torch.log1p(-share)"),
        ("logsigmoid(log_snr).clamp(min=", "logsigmoid(-log_snr).clamp(min="),
        ("(log_abar - table[k]) / 2)", "(log_abar - table[k]))"),
        ("return (k + share) / self.steps", "return (k - share) / self.steps"),
        ("return (t * self.steps - 1).float()", "return (t * self.steps).float()"),
        ("(torch.floor(u * self.steps) + 1)", "(torch.floor(u * self.steps) + 2)"),
        ("s = (t - 1 / self.steps)", "s = (t - 2 / self.steps)"),
        ("(alpha_s / sigma_s * (sigma / alpha)) ** 2 - 1", "(alpha_s / sigma_s * (sigma / alpha)) ** 2 + 1"),
        ("(alpha_s / sigma_s * (sigma / alpha)) ** 2", "(alpha_s / sigma_s * (sigma / alpha))"),
        ("decoder = sigma**2 / alpha**2", "decoder = sigma**2 * alpha**2"),
        ("(s_2**2 - (a_2 / a_1 * s_1) ** 2)", "(s_2**2 + (a_2 / a_1 * s_1) ** 2)"),
        ("return self.steps / 2 * torch", "return self.steps * torch"),
        ("1 + (self.shift - 1) * t", "1 - (self.shift - 1) * t"),
        ("return 1 - sigma, sigma", "return 1 + sigma, sigma"),
        ("sigma = torch.sigmoid(-log_snr / 2)", "sigma = torch.sigmoid(-log_snr)"),
        ("(self.shift - (self.shift - 1) * sigma)", "(self.shift + (self.shift - 1) * sigma)"),
        ("(self.alpha_sigma(t)[1] * self.steps)", "(t * self.steps)"),
        ("torch.sigmoid(torch.special.ndtri(u))", "torch.sigmoid(2 * torch.special.ndtri(u))"),
        ("_MAX_SIGMA * t**_EDM_RHO", "_MAX_SIGMA * t ** (_EDM_RHO - 1)"),
        ("(-log_snr / 2 - math.log(_MAX_SIGMA))", "(-log_snr / 2 + math.log(_MAX_SIGMA))"),
        ("mean + deviation * torch", "mean - 2 * deviation * torch"),
        ("self.time_of(-2 * log_sigma)", "self.time_of(-log_sigma)"),
        ("math.sqrt(2 * math.pi) * torch.exp(z**2 / 2)", "(2 * math.pi) * torch.exp(z**2 / 2)"),
        ("* torch.exp(z**2 / 2)", "* torch.exp(-(z**2) / 2)"),
        ("(table[k + 1] - table[k]) * pieces, t - k", "(table[k] - table[k + 1]) * pieces, t - k"),
        ("log_snr = start + slope * way", "log_snr = start - slope * way"),
        ("torch.exp(logsigmoid(log_snr) / 2)", "torch.exp(logsigmoid(log_snr))"),
        ("torch.exp(logsigmoid(-log_snr) / 2)", "torch.exp(logsigmoid(-log_snr))"),
        ("return -self._piece(t)[1] / 2", "return -self._piece(t)[1]"),
        ("return 2 * (alpha.log() - sigma.log())", "return alpha.log() - sigma.log()"),
        ("per_item(alpha, x0) * x0 + per_item", "per_item(alpha, x0) * x0 - per_item"),
        ("a = alpha_t / alpha_s", "a = alpha_s / alpha_t"),
        ("return a, sigma_t**2 - a**2 * sigma_s**2", "return a, sigma_t**2 + a**2 * sigma_s**2"),
        ("return a, sigma_t**2 - a**2 * sigma_s**2", "return a, sigma_t**2 - a * sigma_s**2"),
        ("return a * sigma_s**2 / sigma_t**2,", "return a * sigma_s / sigma_t,"),
        ("alpha_s * b / sigma_t**2", "b / sigma_t**2"),
        ("schedule.alpha_sigma(t)[1]) ** 2", "schedule.alpha_sigma(t)[1])"),
        ("mean = of_x * x_t + of_x0 * x0", "mean = of_x * x_t - of_x0 * x0"),
        ("before = (2 * t).clamp(max=1)", "before = (3 * t).clamp(max=1)"),
        ("+ (1 - var_mix) * per_item(small", "+ (1 + var_mix) * per_item(small"),
        ("torch.exp(-log_variance_hat)", "torch.exp(-log_variance_hat / 2)"),
        ("square + torch.exp(-spread) - 1", "square + torch.exp(spread) - 1"),
        ("- 1 + spread) / 2", "- 1 - spread) / 2"),
        ("log_variance_hat + math.log(2 * math.pi)) / 2", "log_variance_hat - math.log(2 * math.pi)) / 2"),
    ]),
    "ldm/denoiser.py": ("denoiser weightings matrix sampling low_res", [
        ("return (alpha * eps - sigma * x0)", "return (alpha * eps + sigma * x0)"),
        ("- sigma * x0) / torch.sqrt(alpha**2 + sigma**2)", "- sigma * x0) / (alpha**2 + sigma**2)"),
        ("return of_x * (alpha * x0 + sigma * eps) + of_x0", "return of_x * (alpha * x0 + sigma * eps) - of_x0"),
        ("return eps - x0", "return eps + x0"),
        ("return (x - sigma * out) / alpha, out", "return (x + sigma * out) / alpha, out"),
        ("rv = torch.sqrt(r2) * out", "rv = r2 * out"),
        ("return (alpha * x - sigma * rv) / r2", "return (alpha * x + sigma * rv) / r2"),
        ("(sigma * x + alpha * rv) / r2", "(sigma * x - alpha * rv) / r2"),
        ("return (x - sigma * out) / (alpha + sigma)", "return (x + sigma * out) / (alpha + sigma)"),
        ("(x + alpha * out) / (alpha + sigma)", "(x - alpha * out) / (alpha + sigma)"),
        ("out = (out - of_x * x) / of_x0", "out = (out + of_x * x) / of_x0"),
        ("return out, (x - alpha * out) / sigma", "return out, (x + alpha * out) / sigma"),
        ("(config.min_snr_gamma * s2 / a2)", "(config.min_snr_gamma * a2 / s2)"),
        ("(a2 + config.min_snr_gamma * s2)", "(a2 - config.min_snr_gamma * s2)"),
        ("(s2 / (a2 + s2)) ** config.p2_gamma", "(s2 / (a2 + s2))"),
        ("on_eps = (a2 + s2) / a2", "on_eps = (a2 - s2) / a2"),
        ("on_x0 = (a2 + s2) / s2 if", "on_x0 = (a2 + s2) / a2 if"),
        ("else on_eps * a2 / s2", "else on_eps * s2 / a2"),
        ("torch.as_tensor(of_x0) ** 2", "torch.as_tensor(of_x0)"),
        ('"v": s2 / (a2 + s2)', '"v": s2 / (a2 - s2)'),
        ("s2 / (alpha + sigma) ** 2", "s2 / (alpha - sigma) ** 2"),
        ("eps=(x_t - alpha * x0) / sigma)", "eps=(x_t + alpha * x0) / sigma)"),
        ("x_t = per_item(alpha, x0) * x0 + per_item", "x_t = per_item(alpha, x0) * x0 - per_item"),
        ("loss = error * torch.exp(-u) + u", "loss = error * torch.exp(u) + u"),
        ("loss = error * torch.exp(-u) + u", "loss = error * torch.exp(-u) - u"),
        ("earlier = (t - 1 / schedule.steps)", "earlier = (t - 2 / schedule.steps)"),
        ("bound_share * schedule.steps * kl", "bound_share * kl"),
        ("(out[:, channels:] + 1) / 2", "(out[:, channels:] - 1) / 2"),
        ("self.schedule, t, (t - 1 / self.schedule.steps)", "self.schedule, t, (t - 2 / self.schedule.steps)"),
        ("(alpha**2 + sigma**2).rsqrt()", "(alpha**2 + sigma**2).reciprocal()"),
        ("factor = 2 * loss.detach() /", "factor = loss.detach() /"),
    ]),
    "ldm/sampling.py": ("sampling solvers", [
        ("torch.exp(log_variance / 2) * noise(x)", "torch.exp(log_variance) * noise(x)"),
        ("fresh = eta**2 * posterior", "fresh = eta * posterior"),
        ("(sigma_s**2 - fresh)", "(sigma_s**2 + fresh)"),
        ("per_item(kept.sqrt(), x)", "per_item(kept, x)"),
        ("per_item(fresh.sqrt(), x)", "per_item(fresh, x)"),
        ("h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2", "h = schedule.log_snr(s) - schedule.log_snr(t)"),
        ("per_item(h / (2 * h_before), x)", "per_item(h / h_before, x)"),
        ("* (x0 - x0_before)", "* (x0 + x0_before)"),
        ("x - per_item(alpha_s * torch.expm1(-h), x)", "x + per_item(alpha_s * torch.expm1(-h), x)"),
        ("sigma_s / sigma_t * torch.exp(-h)", "sigma_s / sigma_t * torch.exp(h)"),
        ("kept - per_item(alpha_s * torch.expm1(-2 * h), x)", "kept - per_item(alpha_s * torch.expm1(-h), x)"),
        ("torch.sqrt(-torch.expm1(-2 * h))", "(-torch.expm1(-2 * h))"),
        ("(sigma_s / alpha_s - sigma_t / alpha_t) / 2", "(sigma_s / alpha_s + sigma_t / alpha_t) / 2"),
        ("(sigma_s / alpha_s - sigma_t / alpha_t) / 2", "(sigma_s / alpha_s - sigma_t / alpha_t)"),
        ("min(churn / count, math.sqrt(2) - 1)", "min(churn / count, math.sqrt(2))"),
        ("schedule.log_snr(t) - 2 * math.log1p(gamma)", "schedule.log_snr(t) - math.log1p(gamma)"),
        ("((sigma_up / alpha_up) ** 2 - (sigma / alpha) ** 2)", "((sigma_up / alpha_up) ** 2 + (sigma / alpha) ** 2)"),
        (".clamp(min=0).sqrt()", ".clamp(min=0)"),
        ("per_item(alpha_up / alpha, x) * x", "per_item(alpha / alpha_up, x) * x"),
        ("b = torch.expm1(-h)", "b = torch.expm1(h)"),
        ("at_s = torch.full_like(h, 0.5)", "at_s = torch.full_like(h, 1.0)"),
        ("phi_2 = -b / h - 1", "phi_2 = -b / h + 1"),
        ("phi_3 = -phi_2 / h - 0.5", "phi_3 = -phi_2 / h + 0.5"),
        ("(moments[0] - moments[1]) / (1 - ratio)", "(moments[0] - moments[1]) / (1 + ratio)"),
        ("at_s = moments[0] - behind", "at_s = moments[0] + behind"),
        ("x - per_item(alpha_s * b, x) * (x0 + slope)", "x - per_item(alpha_s * b, x) * (x0 - slope)"),
    ]),
    "ldm/grids.py": ("noise solvers", [
        ("(2 * i * schedule.steps + steps)", "(2 * i * schedule.steps - steps)"),
        ("math.exp(-end / 2 / _KARRAS_RHO)", "math.exp(-end / _KARRAS_RHO)"),
        ("-2 * _KARRAS_RHO * roots.log()", "-1 * _KARRAS_RHO * roots.log()"),
        ("schedule.time_of(log_snr[1:])", "schedule.time_of(log_snr[:-1])"),
    ]),
    "ldm/guidance.py": ("guidance denoiser", [
        ("(w + scale * (b - w) for b, w", "(b + scale * (b - w) for b, w"),
        ("difference + config.momentum * self._before", "difference - config.momentum * self._before"),
        ("difference = difference - (1 - config.parallel)", "difference = difference + (1 - config.parallel)"),
        ("x0 = better.x0 + (scale - 1) * difference", "x0 = better.x0 + scale * difference"),
        ("_deviation(better.x0) / _deviation(x0) + 1", "_deviation(x0) / _deviation(better.x0) + 1"),
        ("x0=x0, eps=(x_t - alpha * x0) / sigma)", "x0=x0, eps=(x_t + alpha * x0) / sigma)"),
        ("(t > self.low) & (t <= self.high)", "(t < self.low) & (t <= self.high)"),
        ("self.scale * sigma * gradient", "self.scale * gradient"),
        ("x0=prediction.x0 + of_step", "x0=prediction.x0 - of_step"),
        ("self.limit * sigma / (alpha**2 + sigma**2).sqrt()", "self.limit * sigma / (alpha**2 + sigma**2)"),
        ("/ gradient[0].numel() ** 0.5", "/ gradient[0].numel()"),
        ("sigma / alpha, torch.zeros_like(alpha)", "sigma, torch.zeros_like(alpha)"),
        ("eps=prediction.eps - step", "eps=prediction.eps + step"),
        ("self.update(better, self.weak", "self.update(self.weak.predict(x_t, t, cond), self.weak"),
    ]),
    "ldm/likelihood.py": ("likelihood", [
        ("(ratio - 1 - ratio.log()", "(ratio - 1 + ratio.log()"),
        ("* x0) ** 2) / 2).flatten", "* x0) ** 2)).flatten"),
        ("nats / math.log(2) for", "nats * math.log(2) for"),
        ("if s[0] > 0:\n            terms", "if s[0] > 0.02:\n            terms"),
        ("+ log_variance + math.log(2 * math.pi)) / 2", "- log_variance + math.log(2 * math.pi)) / 2"),
        ("deviation = torch.exp(log_variance / 2)", "deviation = torch.exp(log_variance)"),
        ("(x - HALF_STEP - mean)", "(x + HALF_STEP / 2 - mean)"),
        ("torch.special.log_ndtr(-below), found", "torch.special.log_ndtr(below), found"),
        ("log_a + torch.log(-torch.expm1", "log_a - torch.log(-torch.expm1"),
        ("torch.linspace(-high / 2, -low / 2,", "torch.linspace(-high / 2, low / 2,"),
        ("z = z + h / 2 * (v + v_next)", "z = z + h / 2 * (v - v_next)"),
        ("log_det = log_det + h / 2", "log_det = log_det - h / 2"),
        ("t = schedule.time_of(-2 * u)", "t = schedule.time_of(-u)"),
        ("torch.sigmoid(2 * u).sqrt()", "torch.sigmoid(2 * u)"),
        ("- unit**2 * z", "+ unit**2 * z"),
        ("(alpha**2 + sigma**2).sqrt()", "(alpha**2 + sigma**2)"),
    ]),
    "ldm/inpainting.py": ("inpainting", [
        ("torch.exp(log_variance / 2) * noise(x)", "torch.exp(log_variance) * noise(x)"),
        ("around = schedule.add_noise(known, noise(x), s)", "around = schedule.add_noise(known, noise(x), t)"),
        ("x = a * before + b.sqrt() * noise(x)", "x = a * before + b * noise(x)"),
        ("x = a * before + b.sqrt() * noise(x)", "x = before + b.sqrt() * noise(x)"),
        ("torch.where(hole > 0, drawn, around)", "torch.where(hole > 0, around, drawn)"),
        ("around = 1 - hole", "around = 1 + hole"),
    ]),
    "ldm/low_res.py": ("low_res residual", [
        ("alpha.to(y).view(column) * y + sigma", "alpha.to(y).view(column) * y - sigma"),
        ("(config.levels).alpha_sigma(level.cpu())", "(config.levels).alpha_sigma(level.cpu() / 2)"),
        ("_blur(low_res**2, CONTRAST_WINDOW_PX) - _blur", "_blur(low_res**2, CONTRAST_WINDOW_PX) + _blur"),
        ("torch.sqrt(spread + config.contrast_floor**2)", "(spread + config.contrast_floor**2)"),
    ]),
    "ldm/models/noisy_classifier.py": ("steering", [
        ("log_softmax(1).gather", "softmax(1).gather"),
    ]),
    "ldm/models/palette.py": ("palette", [
        ("self.colours.float()) ** 2", "self.colours.float())"),
        ("(none < self.config.keep)", "(none > self.config.keep)"),
        ("found[:, :-1].argmax(1)", "found.argmax(1).clamp(max=len(self.colours) - 1)"),
        ("real.sum(1).clamp(min=1)", "real.shape[1]"),
        ("distance <= same, nearest", "distance > same, nearest"),
        ("> config.same / 2", "> config.same"),
        ("descending=True, stable=True", "stable=True"),
    ]),
}  # fmt: skip


def tested(tree: Path, tests: str) -> bool:
    """Whether one of these tests of the tree fails. In a child of this process, which has imported torch already."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(tree)
        import pytest

        sys.path.insert(0, str(tree))
        status = pytest.main(["-x", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in tests.split())])
        os._exit(int(status))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {status} on {tests}")
    return status != 0


def main(words: list[str]) -> int:
    """Make each mutation and tell what became of it."""
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    unseen, count = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "cache", "data", "out"),
                        symlinks=True)  # fmt: skip
        shutil.copytree(ROOT / "tests/data", tree / "tests/data", dirs_exist_ok=True)
        for name, (tests, mutations) in FILES.items():
            source = (ROOT / name).read_text(encoding="utf-8")
            for old, new in mutations:
                line = f"{name}: {' '.join(old.split())}  ->  {' '.join(new.split())}"
                if words and not any(word in line for word in words):
                    continue
                if old not in source:
                    raise ValueError(f"{line}: this is not there")
                (tree / name).write_text(source.replace(old, new, 1), encoding="utf-8")
                noticed, count = tested(tree, tests), count + 1
                print("noticed" if noticed else "NOT NOTICED", line, flush=True)
                unseen += [] if noticed else [line]
            (tree / name).write_text(source, encoding="utf-8")
    print(f"{count - len(unseen)} of {count} noticed", *unseen, sep="\n")
    return int(bool(unseen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
