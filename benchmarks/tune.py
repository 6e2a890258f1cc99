"""Choose tile sizes on a GPU: `python -m benchmarks.tune` writes configs/<gpu>.json of the kernels.

Every setting of the search space is checked against float64 before it is timed, in every mode that ships (Hopper has
miscompiled single settings of other kernels, so checking the winner alone is not enough); one that is wrong is reported
and never chosen. Times are medians over samples that take all settings in turn, on input sets that rotate through more
than the L2 cache. The result is a file of the package: no rank tunes anything at run time.

Legend: I images, N images of a sample, P patches, C feature width, H heads, D head width, Q queries.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import samtrain_kernels
import torch
import typer
from samtrain_kernels.settings import (
    CONTEXT_KERNELS,
    DTYPES,
    IMAGE_BUCKETS,
    SEARCH_SPACE,
    SEARCH_SPACES,
    KernelSetting,
    PatchSetting,
    file_name,
)
from samtrain_kernels.testing import CEILING, Kind, rms_error
from torch import Tensor

from benchmarks.kernels import machine, measure
from benchmarks.kernels.inputs import CrossInputs, derive, draw_cross
from benchmarks.kernels.shapes import SHAPES, Context, Shape

Setting = KernelSetting | PatchSetting

# One number of images for each bucket of settings.
IMAGES = {"1-2": 2, "3-4": 4, "5-6": 5, "7+": 10}
assert IMAGES.keys() == IMAGE_BUCKETS.keys()

RESULTS = Path(__file__).parent / "results"
NO_GPU = """\
benchmarks.tune: this machine has no CUDA device, and tile sizes can be chosen on a GPU alone.
Run `python -m benchmarks.tune` on the GPU you train on and commit the files it writes. Until then the defaults in
configs/sm_80.json and configs/sm_90.json are used, which come from compile tables, not from measurements."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Mode:
    """A way a kernel is called: `queries` as in context_attention."""

    context: Context
    queries: Literal["image", "group"]


MODES = (Mode("others", "image"), Mode("all", "group"), Mode("all", "image"))
TIMED_MODE = MODES[0]


@dataclass
class Candidate:
    """A setting of a kernel for a bucket of images. why: what is wrong with it, "" where it is right."""

    kernel: str
    images: str
    setting: Setting
    why: str = ""
    milliseconds: float | None = None
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Inputs of a kernel with its exact results. run: setting -> results by name."""

    run: Callable[[Any], Mapping[str, Tensor]]
    exact: Mapping[str, Tensor]
    kinds: Mapping[str, Kind]


def workload(shape: Shape, *, device: torch.device, dtype: torch.dtype, seed: int, context: Context) -> CrossInputs:
    drawn = draw_cross(shape, context, trained=True, device=device, dtype=dtype, backend="triton", seed=seed)
    with torch.no_grad():
        return derive(drawn, chained=False)


def problem(kernel: str, inputs: CrossInputs, mode: Mode) -> Problem:
    """What `kernel` computes on `inputs`, as a function of its setting, and the truth in float64."""
    if kernel in CONTEXT_KERNELS:
        return _context_problem(kernel, inputs, mode)
    from samtrain_kernels.image_mix import triton as kernels

    features, weight = inputs.features, inputs.score_weight.detach()
    wide = features.double()
    if kernel == "patch_logits":
        exact = {"logits": wide @ weight.double()}
        return Problem(
            lambda s: {"logits": kernels.patch_logits(features, weight, setting=s)}, exact, {"logits": "output"}
        )
    gradient = _normal(features.shape[:2], features, torch.float32)
    return Problem(
        lambda s: {"dw": kernels.score_weight_gradient(gradient, features, setting=s)},
        {"dw": torch.einsum("ip,ipc->c", gradient.double(), wide)},
        {"dw": "mix_gradient"},
    )


def _context_problem(kernel: str, inputs: CrossInputs, mode: Mode) -> Problem:
    from samtrain_kernels.context_attention import triton as kernels
    from samtrain_kernels.context_attention.reference import (
        AttentionInputs,
        context_attention_backward_reference,
        context_attention_reference,
    )

    key, value = inputs.key_value.detach().unbind(2)
    query = (inputs.query if mode.queries == "image" else inputs.context_query).detach()
    scale = inputs.shape.head_dim**-0.5
    given = AttentionInputs(
        query, key, value, inputs.weights.detach(), None, None, inputs.groups, inputs.context, mode.queries, scale
    )
    wide = given._replace(query=query.double(), key=key.double(), value=value.double(), weights=given.weights.double())
    exact_output, exact_lse = context_attention_reference(wide)
    if kernel == "context_forward":
        return Problem(
            lambda s: {"output": kernels.forward(given, setting=s)[0]}, {"output": exact_output}, {"output": "output"}
        )
    output, lse = exact_output.to(query.dtype), exact_lse.float()
    gradient = _normal(query.shape, query, query.dtype)
    needs = (True, False, False, True, False, False)
    names: dict[str, Kind] = {"query": "gradient", "weights": "mix_gradient"}
    if kernel == "context_kv_grad":
        needs = (True, True, True, True, False, False)
        names = {"query": "gradient", "key": "gradient", "value": "gradient", "weights": "mix_gradient"}
    exact = context_attention_backward_reference(wide, gradient.double(), exact_output, exact_lse, needs)

    def run(setting: Any) -> Mapping[str, Tensor]:
        chosen = {"kv_setting" if kernel == "context_kv_grad" else "setting": setting}
        return dict(zip(names, kernels.backward(given, gradient, output, lse, needs, **chosen), strict=True))

    return Problem(run, dict(zip(names, exact, strict=True)), names)


def _normal(size: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(11)
    return torch.randn(*size, generator=generator, device=like.device, dtype=torch.float32).to(dtype)


def check(candidate: Candidate, problems: Sequence[Problem], dtype: torch.dtype) -> None:
    """Fill in why a setting is wrong, in any mode; a setting that does not compile or launch is wrong too."""
    for of_mode in problems:
        try:
            got = of_mode.run(candidate.setting)
        except Exception as error:
            candidate.why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
            return
        for name, exact in of_mode.exact.items():
            error_here = rms_error(got[name], exact)
            candidate.errors[name] = max(error_here, candidate.errors.get(name, 0.0))
            ceiling = CEILING[dtype][of_mode.kinds[name]]
            if not error_here <= ceiling:
                candidate.why = candidate.why or f"{name}: RMS error {error_here:.2g} > {ceiling:.2g}"


def time_candidates(candidates: Sequence[Candidate], sets: Sequence[Problem], timer: Any, *, samples: int = 30) -> None:
    """Median milliseconds of each, all in turn; only of those that are right."""
    right = [candidate for candidate in candidates if not candidate.why]
    seen: dict[int, list[float]] = {i: [] for i in range(len(right))}
    for _ in range(samples):
        for i, candidate in enumerate(right):
            start = timer.mark()
            for one in sets:
                one.run(candidate.setting)
            seen[i].append(timer.milliseconds(start, timer.mark()) / len(sets))
    for i, candidate in enumerate(right):
        candidate.milliseconds = measure.quantile(sorted(seen[i]), 0.5)


def tune(
    *,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    timer: Any,
    space: Mapping[str, Sequence[Setting]] = SEARCH_SPACE,
    kernels: Sequence[str] = tuple(SEARCH_SPACE),
    images: Mapping[str, int] = IMAGES,
    num_sets: int = 4,
    say: Callable[[str], None] = print,
) -> list[Candidate]:
    """Check and time every setting of `space` for `kernels` and every bucket."""
    found: list[Candidate] = []
    for kernel in kernels:
        is_context = kernel in CONTEXT_KERNELS
        for bucket, n in images.items() if is_context else [("any", max(images.values()))]:
            sized = replace(shape, counts=(n,) * shape.groups)
            candidates = [Candidate(kernel, bucket, setting) for setting in space[kernel]]
            modes = MODES if is_context else MODES[:1]
            problems = [
                problem(
                    kernel, workload(small_of(sized), device=device, dtype=dtype, seed=1, context=mode.context), mode
                )
                for mode in modes
            ]
            for candidate in candidates:
                check(candidate, problems, dtype)
            sets = [
                problem(kernel, workload(sized, device=device, dtype=dtype, seed=2 + i, context="others"), TIMED_MODE)
                for i in range(num_sets)
            ]
            time_candidates(candidates, sets, timer)
            found += candidates
            say(_line(candidates))
    return found


def search_space(capability: tuple[int, int]) -> Mapping[str, Sequence[Setting]]:
    """What may be tried on a chip: settings that the compiler did not spill on it, or on the nearest older one."""
    known = [c for c in SEARCH_SPACES if c <= capability]
    return SEARCH_SPACES[max(known)] if known else SEARCH_SPACE


def small_of(shape: Shape) -> Shape:
    """A ragged batch for the check: one sample of every size up to the bucket's."""
    n = shape.most_images
    return replace(shape, counts=(n, 1, max(1, n - 1)))


def winners(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The fastest right setting of every kernel and bucket.

    Raises:
        RuntimeError: no setting of a kernel is right; the message holds why.
    """
    best = []
    for key in dict.fromkeys((c.kernel, c.images) for c in candidates):
        same = [c for c in candidates if (c.kernel, c.images) == key]
        right = [c for c in same if not c.why and c.milliseconds is not None]
        if not right:
            raise RuntimeError(f"{key[0]}, {key[1]} images: no setting is right: " + "; ".join(c.why for c in same))
        best.append(min(right, key=lambda c: c.milliseconds or 0.0))
    return best


def settings_content(
    best: Sequence[Candidate], *, gpu: str, dtype: str, head_dim: int, measured: dict[str, Any]
) -> Any:
    """A settings file, as samtrain_kernels.settings reads it."""
    rows = []
    for candidate in best:
        row: dict[str, Any] = {"kernel": candidate.kernel}
        if candidate.kernel in CONTEXT_KERNELS:
            row |= {"head_dim": head_dim, "images": candidate.images}
        rows.append(row | {"dtype": dtype} | asdict(candidate.setting))
    how = "fastest right setting of the search space, python -m benchmarks.tune"
    return {"gpu": gpu, "tuned": True, "how": how, "measured": measured, "settings": rows}


def write(
    best: Sequence[Candidate], folder: Path, *, gpu: str, dtype: str, head_dim: int, measured: dict[str, Any]
) -> list[Path]:
    """One file for each family of kernels, under `folder`/<family>/configs."""
    paths = []
    for family, is_context in (("context_attention", True), ("image_mix", False)):
        of_family = [c for c in best if (c.kernel in CONTEXT_KERNELS) == is_context]
        if not of_family:
            continue
        path = folder / family / "configs" / file_name(gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = settings_content(of_family, gpu=gpu, dtype=dtype, head_dim=head_dim, measured=measured)
        path.write_text(json.dumps(content, indent=1) + "\n")
        paths.append(path)
    return paths


def _line(candidates: Sequence[Candidate]) -> str:
    """The fastest first; then what is wrong."""
    timed = sorted((c for c in candidates if c.milliseconds is not None), key=lambda c: c.milliseconds or 0.0)
    words = [f"{_short(c.setting)} {c.milliseconds:.4f} ms" for c in timed]
    words += [f"{_short(c.setting)} WRONG {c.why}" for c in candidates if c.why]
    return f"{candidates[0].kernel}, {candidates[0].images} images: " + ", ".join(words)


def _short(setting: Setting) -> str:
    return "/".join(str(value) for value in asdict(setting).values())


@app.command(help=__doc__)
def main(
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    kernel: Annotated[list[str] | None, typer.Option(help=", ".join(SEARCH_SPACE))] = None,
    out: Annotated[Path | None, typer.Option(help="folder instead of the package's own")] = None,
) -> None:
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        raise typer.Exit(2)
    if dtype not in DTYPES or (unknown := [k for k in kernel or [] if k not in SEARCH_SPACE]):
        given = dtype if dtype not in DTYPES else ", ".join(unknown)
        raise typer.BadParameter(f"{given}: choose from {', '.join((*DTYPES, *SEARCH_SPACE))}")
    device = torch.device("cuda")
    header = machine.header(device, rates=measure.device_rates(device))
    print("\n".join(machine.headline(header)))
    kernels = tuple(kernel or SEARCH_SPACE)
    shape = SHAPES["A"]
    capability = torch.cuda.get_device_capability(device)
    found = tune(
        shape=shape, device=device, dtype=DTYPES[dtype], timer=measure.EventTimer(), kernels=kernels,
        space=search_space(capability),
    )  # fmt: skip
    results = RESULTS / f"tune-{file_name(header['gpu'])}"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps({"header": header, "candidates": [asdict(c) for c in found]}, indent=1) + "\n")
    measured = {key: header[key] for key in ("gpu", "commit", "versions", "smi", "cuda")}
    measured["capability"] = list(capability)
    folder = out or Path(samtrain_kernels.__path__[0])
    for path in write(
        winners(found), folder, gpu=header["gpu"], dtype=dtype, head_dim=shape.head_dim, measured=measured
    ):
        print(f"wrote {path}")
    wrong = [c for c in found if c.why]
    if wrong:
        print(f"{len(wrong)} settings are wrong on this GPU; see {results}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
