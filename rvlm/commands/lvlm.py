"""lvlm: what an attack does to the answers of an LVLM."""

import shutil
import sys
from typing import Any

from rvlm.arguments import CHECK_FAILED, DATA_MISSING, LvlmArgs
from rvlm.commands.shared import Run, check_alone, check_unsaid, device_of, root_of
from rvlm.data.tasks import TASKS, Task
from rvlm.units import Eps

__all__ = ["lvlm"]


def lvlm(args: LvlmArgs) -> int:
    """OUT/result/NAME-TARGET.json and the answers in OUT/samples/NAME-TARGET.jsonl; of a protocol, each part's."""
    from rvlm.lvlm import SCORES, load_lvlm, load_questions, white_adapter
    from rvlm.models import Adapter

    if not args.model or not (args.data or args.protocol):
        raise ValueError("which model, and asked what? rvlm lvlm --model FOLDER_OR_NAME --data QUESTIONS.jsonl")
    if args.score not in SCORES:
        raise ValueError(f"unknown score {args.score!r}: expected {', '.join(SCORES)}")
    check_alone("lvlm")
    args.eps.check("linf")
    protocol, parts = _asked(args)
    model = load_lvlm(args.model, device_of(args.device), dtype=args.dtype, size=args.size)
    adapter = None
    if args.adapter is not None:
        adapter = white_adapter(model) if args.adapter == "white" else Adapter.load(args.adapter)
    if protocol is None:
        data = load_questions(args.data, model.size, args.limit)
        run = Run("lvlm", args)
        task = Task("{}", args.score, args.max_tokens)
        rows = _measured(args, run, model, data, adapter, args.attack, args.eps, task, args.seed)
        run.finish(rows, _table(rows, args))
        shutil.rmtree(run.out / "state", ignore_errors=True)
        return 0
    run, mark = Run("lvlm", args), {"name": protocol.name, "sha": protocol.sha}
    rows, missing, broken = [], [], []
    for part, spec, task in parts:
        try:
            data = protocol.drawn(part, load_questions(spec, model.size)).limited(args.limit, protocol.seed)
        except (FileNotFoundError, ValueError) as error:
            (missing if isinstance(error, FileNotFoundError) else broken).append(part.data)
            print(f"NOT MEASURED {part.data}: {error}", file=sys.stderr)
            continue
        for attack, radii in part.attacks.items():
            for eps in map(Eps, radii):
                rows += _measured(args, run, model, data, adapter, attack, eps, task, protocol.seed, mark)
    run.manifest |= {"protocol": mark, "missing": missing, "broken": broken}
    run.finish(rows, _table(rows, args), status="incomplete" if missing or broken else "complete")
    shutil.rmtree(run.out / "state", ignore_errors=True)
    return DATA_MISSING if missing else CHECK_FAILED if broken else 0


def _asked(args: LvlmArgs) -> tuple[Any, list[tuple[Any, str, Task]]]:
    """The protocol, and of its parts that an LVLM answers the part, its data and its task; (None, []) without one."""
    from rvlm.evaluation import load_protocol

    if args.protocol is None:
        return None, []
    protocol = load_protocol(args.protocol)
    told = ("data", "attack", "eps", "aim", "score", "max_tokens", "seed", "save_png")
    check_unsaid(args, told, f"protocol {protocol.name}")
    parts = [(part, f"{part.data}:{root_of(args)}", TASKS[part.task]) for part in protocol.parts if part.task]
    if not parts:
        raise ValueError(f"protocol {protocol.name} asks LVLMs nothing: rvlm eval --protocol {protocol.name}")
    return protocol, parts


def _measured(
    args: LvlmArgs, run: Run, model, data, adapter, attack: str, eps: Eps, task: Task, seed: int, mark=None
) -> list[dict[str, Any]]:
    """Attacks the model on some questions, and writes what comes of it; of a protocol, records that an earlier attempt
    wrote are taken as they are."""
    from rvlm.evaluation.images import write_png
    from rvlm.evaluation.records import record_stem
    from rvlm.lvlm import evaluate_answers
    from rvlm.lvlm.records import answered_before, write_answers

    settings = {
        "attack": attack, "aim": args.aim, "max_tokens": task.max_tokens, "batch_size": args.batch_size, "seed": seed,
        "quantize": 255 if args.save_png else None,
    }  # fmt: skip
    about = {"eps": str(eps), "partial": args.limit is not None, "protocol": mark}
    if mark and (rows := answered_before(run.out, model, data, adapter, settings, **about)) is not None:
        return rows
    # Without a protocol records are not named by data and attack; then neither is the state, so that others refuse it.
    state = run.out / "state" / f"{record_stem(data.name, attack, str(eps)) if mark else 'answers'}.npz"
    results = evaluate_answers(
        model, data, eps=float(eps), adapter=adapter, score=task.score, keep_images=args.save_png,
        state=None if args.save_png else state,  # a run that was killed goes on with the same command
        **settings,
    )  # fmt: skip
    rows = write_answers(run.out, results, model, data, adapter, settings, **about)
    state.unlink(missing_ok=True)
    for result in results if args.save_png else ():
        if result.target != "transfer":
            for answers, pixels in zip(result.rows, result.x_adv, strict=True):
                write_png(run.out / "png" / f"{result.name}-{result.target}" / f"{answers['index']:06d}.png", pixels)
    return rows


def _table(rows: list[dict[str, Any]], args: LvlmArgs) -> str:
    from rvlm.report import markdown

    columns = {
        "name": "model", "target": "target", "score": "score", "clean": "clean %", "robust": "robust %",
        "relative_clean": "relative clean", "relative_robust": "relative robust", "loss_clean": "clean loss",
        "loss_robust": "robust loss", "samples": "samples",
    }  # fmt: skip
    columns = {"data": "data", "attack": "attack", "eps": "eps"} | columns if args.protocol else columns
    return markdown(rows, columns | ({} if args.aim is None else {"aimed": "share with the aim"}))
