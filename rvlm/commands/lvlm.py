"""lvlm: what an attack does to the answers of an LVLM."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import time

from rvlm.arguments import LvlmArgs
from rvlm.commands.shared import Run, device_of

__all__ = ["lvlm"]


def lvlm(args: LvlmArgs) -> int:
    """OUT/result/NAME-TARGET.json and the answers in OUT/samples/NAME-TARGET.jsonl."""
    from rvlm.evaluation.images import write_png
    from rvlm.evaluation.records import environment
    from rvlm.files import write_bytes
    from rvlm.lvlm import SCORES, evaluate_answers, load_lvlm, load_questions, white_adapter
    from rvlm.models import Adapter
    from rvlm.report import markdown

    if not args.model or not args.data:
        raise ValueError("which model, and asked what? rvlm lvlm --model FOLDER_OR_NAME --data QUESTIONS.jsonl")
    if args.score not in SCORES:
        raise ValueError(f"unknown score {args.score!r}: expected {' or '.join(SCORES)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("lvlm runs in one process: start it without torchrun")
    args.eps.check("linf")
    model = load_lvlm(args.model, device_of(args.device), dtype=args.dtype, size=args.size)
    data = load_questions(args.data, model.size, args.limit)
    adapter = None
    if args.adapter is not None:
        adapter = white_adapter(model) if args.adapter == "white" else Adapter.load(args.adapter)
    run, began, rows = Run("lvlm", args), time.time(), []
    results = evaluate_answers(
        model, data, attack=args.attack, eps=args.eps, adapter=adapter, score=args.score, aim=args.aim,
        max_tokens=args.max_tokens, batch_size=args.batch_size, seed=args.seed, quantize=255 if args.save_png else None,
    )  # fmt: skip
    seconds = round(time.time() - began, 2)
    for result in results:
        stem = f"{result.name}-{result.target}"
        row = {
            "name": result.name, "clean": result.mean("score_clean"), "robust": result.mean("score_adv"),
            "relative_clean": result.relative("score_clean"), "relative_robust": result.relative("score_adv"),
            "loss_clean": result.mean("loss_clean"), "loss_robust": result.mean("loss_adv"), "score": args.score,
            "eps": str(args.eps), "attack": args.attack, "target": result.target, "samples": len(result.rows),
            "seconds": seconds, "record": f"result/{stem}.json",
        }  # fmt: skip
        if args.aim is not None:
            row["aimed"] = result.mean("aim_adv")
        record = {
            "schema": "rvlm.answers/1", **row, "norm": "linf", "aim": args.aim, "seed": args.seed, "model": args.model,
            "adapter": None if result.name == "before" else dataclasses.asdict(adapter.config),
            "data": {"name": args.data, "size": model.size, "partial": args.limit is not None},
            "rows": f"samples/{stem}.jsonl",
            "env": environment() | {"transformers": importlib.metadata.version("transformers")},
        }  # fmt: skip
        run.write_json(run.out / row["record"], record)
        lines = "".join(json.dumps(answers, ensure_ascii=False) + "\n" for answers in result.rows)
        write_bytes(run.out / record["rows"], lines.encode())
        if args.save_png and result.target != "transfer":
            for answers, pixels in zip(result.rows, result.x_adv, strict=True):
                write_png(run.out / "png" / stem / f"{answers['index']:06d}.png", pixels)
        rows.append(row)
    columns = {
        "name": "model", "target": "target", "clean": f"clean {args.score} %", "robust": f"robust {args.score} %",
        "relative_clean": "relative clean", "relative_robust": "relative robust", "loss_clean": "clean loss",
        "loss_robust": "robust loss", "samples": "samples",
    } | ({} if args.aim is None else {"aimed": "share with the aim"})  # fmt: skip
    return run.finish(rows, markdown(rows, columns))
