"""train and convert: what makes models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rvlm.arguments import CHECK_FAILED, ConvertArgs, TrainArgs
from rvlm.commands.shared import Run, device_of, together, warn
from rvlm.plugins import file_sha

__all__ = ["convert", "train"]


def train(args: tuple[TrainArgs, Any]) -> int:
    from rvlm.data import load_data
    from rvlm.evaluation import Evaluation, both_targets, evaluate, parse_attack, write_evaluation
    from rvlm.methods import method_class
    from rvlm.models import Clip, ZeroShotClassifier, load_clip
    from rvlm.training import check_training
    from rvlm.training import train as run_training

    args, settings = args
    parse_attack(args.eval_attack)
    check_training(method_class(args.method)(settings), args.parallel, args.tensorboard)
    with together(args) as ranks:
        with ranks.first_before_others():  # models of the zoo are trained on first use
            data = load_data(
                args.data, args.split, size=args.size, limit=args.limit, shots=args.shots, seed=args.seed,
                draw=args.draw,
            )  # fmt: skip
            data, held_out = data.held_out(args.validate) if args.validate else (data, None)
            test = load_data(args.eval_data or args.data, "test", size=args.size, limit=args.eval_limit)
            student = load_clip(args.student, device_of(args.device), seed=args.seed)
        method = method_class(args.method)(settings)
        run = Run("train", args) if ranks.first else None
        out = ranks.share(None if run is None else str(run.out))  # its default name holds the time
        rows = []

        def measure(
            name: str, source: Clip | None = None, checks: Callable[[Evaluation], list[dict]] = lambda found: []
        ) -> Evaluation:
            classifier, made_on = (
                clip and ZeroShotClassifier(clip, test.class_names, method.training_templates(test))
                for clip in (student, source)
            )
            found = evaluate(
                classifier, test, attack=args.eval_attack, eps=settings.eps, source=made_on, seed=args.seed,
                device=student.device,
            )  # fmt: skip
            found.checks += checks(found)
            if run is not None:
                about = {
                    "method": None if name == "before" else args.method,
                    "method_sha": None if name == "before" else file_sha(type(method)),
                    "processes": ranks.size,
                    "source": made_on,
                }
                rows.append(write_evaluation(run.out, name, found, test, classifier, **about))
                warn(found.checks)
            return found

        measure("before")
        result = run_training(
            student, data, method, seed=args.seed, out=out, validation=held_out, parallel=args.parallel,
            tensorboard=args.tensorboard,
        )  # fmt: skip
        if ranks.first:
            speed = result.images / result.seconds
            print(
                f"trained on {result.images} images in {result.seconds:.1f} s ({speed:.0f} images/s), after "
                f"{result.setup_seconds:.1f} s for teachers and class embeddings"
            )
        white_box = measure("after", checks=lambda found: result.checks)
        if method.undefended is not None:
            measure("after", method.undefended, lambda found: both_targets(white_box, found))
        return 0 if run is None else run.finish(rows)


def convert(args: ConvertArgs) -> int:
    """Writes the model and its card, loads it back and says by how much its embeddings differ."""
    from rvlm.files import write_bytes
    from rvlm.models import convert as write_model
    from rvlm.models import load_clip
    from rvlm.models.convert import difference, read_back
    from rvlm.report import model_card

    if not (args.src and args.dst):
        raise ValueError("convert takes a model and a folder: rvlm convert SRC DST --to hf")
    if args.base is None and Path(args.src).is_file():
        raise ValueError(f"{args.src} holds weights alone: give the CLIP that they belong onto, --base ViT-B-32:openai")
    spec = args.src if args.base is None else f"{args.base}+weights={args.src}"
    clip = load_clip(spec)
    folder = write_model(clip, args.dst, args.to)
    runs = args.runs.split(",") if args.runs else [args.src] if Path(args.src, "result").is_dir() else []
    write_bytes(folder / "README.md", model_card(clip, args.to, runs).encode())
    gap = difference(clip, read_back(clip, folder, args.to))
    print(f"written to {folder}; loaded back, embeddings differ by at most {gap:.1g}")
    return 0 if gap <= 1e-5 else CHECK_FAILED
