"""Prompt methods: prompts alone learn, losses against their formulas, who moves whom, what is fixed and what is not."""

import pytest
import torch
from torch.nn import functional as F

from rvlm import ops
from rvlm.attacks import scoring
from rvlm.data import load_data
from rvlm.evaluation import evaluate
from rvlm.methods import Batch, build_method
from rvlm.models import ZeroShotClassifier, load_clip
from rvlm.models.text import encode, tokenized
from rvlm.training import train

QUICK = {"epochs": 1, "batch_size": 32, "warmup_steps": 1, "steps": 1}
SMALL = {"visual_tokens": 3, "visual_depth": 2, "text_tokens": 2, "text_depth": 2, "words": "a scan"}
TEXT = {"text_tokens": 4, "text_depth": 1}
MORE = {
    "advvp": {"visual_tokens": 3, "visual_depth": 2},
    "advvlp": SMALL,
    "advmaple": SMALL | {"visual_tokens": 2},
    "ivlp": SMALL,
    "fap": SMALL | {"visual_tokens": 2},
    "apt": TEXT,
    "advpt": TEXT,
    "apd": SMALL,
}


@pytest.fixture(scope="module")
def data():
    return load_data("digits", "train", limit=64)


def build(name, **settings):
    return build_method(name, **(QUICK | MORE[name] | settings))


@pytest.fixture
def scene(data):
    """scene(name, **settings) -> method after attack and setup, batch, float64 embeddings of both kinds of images."""

    def make(name, student="tiny-vit", **settings):
        student, method = load_clip(student, seed=1), build(name, **settings)
        torch.manual_seed(0)
        method.setup(student, data)
        batch = Batch(*data.batch(slice(0, 8)))
        noise = torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        batch.x_adv = (batch.x + 0.06 * noise).clamp(0, 1)
        if method.inputs != "clean":
            method.attack(batch)
        out = [student(v).detach().requires_grad_() for v in (batch.x_adv, batch.x)]
        return method, batch, *out

    return make


def kl(first, second):
    p, q = first.log_softmax(1), second.log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


def logits(method, embedding, clip=None):
    """By the sentences, encoded anew."""
    clip = clip or method.student
    names = load_data("digits").class_names
    texts = tokenized(clip, [method.config.sentence.format(name) for name in names])
    return clip.logit_scale * embedding @ encode(clip, texts, clip.adapter.context).T


@pytest.mark.parametrize("name", MORE)
def test_prompts_alone_learn_and_follow_the_seed(data, name, tmp_path):
    before, results = load_clip("tiny-vit"), []
    x, y, _ = data.batch(slice(0, 4))
    for seed in (0, 0, 1):
        student, method = load_clip("tiny-vit"), build(name)
        train(student, data, method, seed=seed, progress=False, out=tmp_path if seed else None)
        assert not any(p.requires_grad for p in student.parameters())
        assert all(torch.equal(t, student.model.state_dict()[key]) for key, t in before.model.state_dict().items())
        classifier = ZeroShotClassifier(student, data.class_names)
        with scoring(classifier):
            results.append(classifier(x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    saved = load_clip(str(tmp_path))
    assert {n for n, _ in saved.adapter.named_parameters()} == {
        n for n in ("prompts", "context") if getattr(student.adapter, n) is not None
    }
    classifier = ZeroShotClassifier(saved, data.class_names)
    with scoring(classifier):
        assert torch.equal(classifier(x), results[2])
    assert (tmp_path / "checkpoint" / "adapter.safetensors").stat().st_size < 10_000


@pytest.mark.parametrize("name", [name for name in MORE if name not in ("advpt", "fap")])
def test_it_learns(data, name):
    settings = {"epochs": 5, "lr": 2e-2, "eps": "1/255"}
    history = train(load_clip("tiny-vit", seed=1), data, build(name, **settings), progress=False).history
    assert history[-1]["loss"] < 0.985 * history[0]["loss"]


@pytest.mark.parametrize("name", ["advvp", "advvlp", "advmaple", "apt"])
def test_cross_entropy_on_adversarial_images(scene, name):
    method, batch, adv, _ = scene(name)
    if name == "advvp":
        texts = ZeroShotClassifier(load_clip("tiny-vit", seed=1), load_data("digits").class_names, "digits")
        expected = F.cross_entropy(adv @ texts.head(), batch.y)
    else:
        expected = F.cross_entropy(logits(method, adv), batch.y)
    torch.testing.assert_close(method.loss(adv, None, batch)["total"], expected, rtol=1e-4, atol=1e-5)


def test_clean_tuning_has_no_attack(scene):
    method, batch, _, clean = scene("ivlp")
    assert method.inputs == "clean" and method.attack(batch) is None
    expected = F.cross_entropy(logits(method, clean), batch.y)
    torch.testing.assert_close(method.loss(None, clean, batch)["total"], expected, rtol=1e-4, atol=1e-5)


def test_fap_is_its_formula(scene):
    method, batch, adv, clean = scene("fap", trade_off=0.7)
    z_adv, z = logits(method, adv), logits(method, clean)
    weighted = kl(z, z_adv) * (1 + (F.normalize(clean, dim=1) * F.normalize(adv, dim=1)).sum(1))
    expected = F.cross_entropy(z, batch.y) + 0.7 * weighted.mean()
    total = method.loss(adv, clean, batch)["total"]
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(t, (adv, clean), retain_graph=True) for t in (total, expected))
    for got, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5)
    raised = method.attack(batch)(adv)
    with scoring(method.student):
        own = logits(method, method.student(batch.x))
    torch.testing.assert_close(raised, kl(own, logits(method, adv)), rtol=1e-3, atol=1e-5)


def test_advpt_looks_at_images_that_were_made_before(data, monkeypatch):
    student, method = load_clip("tiny-vit", seed=1), build("advpt")
    train(student, data, method, progress=False)
    batch = Batch(*data.batch(torch.tensor([5, 2])))
    plain = ZeroShotClassifier(load_clip("tiny-vit", seed=1), data.class_names, "digits").eval()
    torch.testing.assert_close(method.embeddings[[5, 2]].norm(dim=1), torch.ones(2))
    with scoring(plain):
        clean, kept = (F.cross_entropy(e @ plain.head(), data.y) for e in (plain.embed(data.batch(slice(None))[0]),
                                                                           method.embeddings))  # fmt: skip
    assert kept > clean + 0.01
    torch.testing.assert_close(method.embeddings[:2], plain.embed(method.images.at(data.index[:2])))
    expected = F.cross_entropy(logits(method, method.embeddings[[5, 2]]), batch.y)
    torch.testing.assert_close(method.loss(None, None, batch)["total"], expected, rtol=1e-4, atol=1e-5)


def test_what_apts_attack_sees(scene):
    heads = {}
    for adversary in ("onfly", "constant", "perturbed"):
        method, batch, adv, _ = scene("apt", adversary=adversary)
        before = method.student.adapter.context.detach().clone()
        heads[adversary] = method.attack(batch)(adv).detach()
        assert torch.equal(before, method.student.adapter.context)
        torch.testing.assert_close(
            method.loss(adv, None, batch)["total"], F.cross_entropy(logits(method, adv), batch.y), rtol=1e-4, atol=1e-5
        )
    z = logits(method, adv)
    torch.testing.assert_close(heads["onfly"], F.cross_entropy(z, batch.y, reduction="none"), rtol=1e-4, atol=1e-5)
    by_hand = ZeroShotClassifier(load_clip("tiny-vit", seed=1), load_data("digits").class_names, "digits")
    expected = F.cross_entropy(adv @ by_hand.head(), batch.y, reduction="none")
    torch.testing.assert_close(heads["constant"], expected, rtol=1e-4, atol=1e-5)
    assert heads["perturbed"].mean() > heads["onfly"].mean()


@pytest.mark.parametrize("name, derived, source", [
    ("advmaple", "prompts", "context"), ("fap", "context", "prompts")
])  # fmt: skip
def test_coupled_rows_are_linear_maps(data, name, derived, source):
    student, method = load_clip("tiny-vit"), build(name)
    torch.manual_seed(0)
    method.setup(student, data)
    adapter, first = student.adapter, 0 if name == "advmaple" else 1
    maps = adapter.parametrizations[derived][0].maps
    assert len(maps) == 2 - first
    for number, of in enumerate(maps, first):
        torch.testing.assert_close(getattr(adapter, derived)[number], of(getattr(adapter, source)[number]))
    learn = {id(p) for group in method.learning() for p in group["params"]}
    assert all(id(p) in learn for p in maps.parameters()) and id(getattr(adapter, source)) in learn
    assert (id(adapter.parametrizations[derived].original) in learn) == (first == 1)
    rows = getattr(adapter, derived).detach()
    method.finish()
    assert torch.equal(getattr(adapter, derived), rows) and not hasattr(adapter, "parametrizations")


def test_coupled_rows_are_not_rounded(scene):
    adapter = scene("advmaple")[0].student.adapter
    with torch.autocast("cpu", torch.bfloat16):
        rows = adapter.prompts
    assert torch.equal(rows, adapter.prompts)


@pytest.mark.parametrize("name, settings", [("fap", {}), ("apd", {"inner_loss": "kl_self"})])
def test_an_attack_in_16_bits_begins_at_the_clean_image_as_it_is_there(scene, name, settings):
    """The same tower in the same arithmetic: no divergence."""
    method, batch, *_ = scene(name, precision="bf16", **settings)
    with scoring(method.student), torch.autocast("cpu", torch.bfloat16):
        embedding = method.student(batch.x)
    with torch.no_grad():
        assert method.attack(batch)(embedding.float()).abs().max() < 1e-7


def test_text_is_encoded_once_a_step(data, monkeypatch):
    calls = []
    monkeypatch.setattr("rvlm.methods.prompts.encode", lambda *args: (calls.append(1), encode(*args))[1])
    for name, settings, per_step in (
        ("advvlp", {"steps": 5}, 1), ("apd", {"steps": 5}, 2), ("apd", {"teacher": "zero_shot"}, 1), ("ivlp", {}, 1),
        ("apd", {"inner_loss": "kl_teacher"}, 2), ("advvp", {}, 0),
    ):  # fmt: skip
        calls.clear()
        train(load_clip("tiny-vit"), data, build(name, **settings), progress=False)
        assert len(calls) == 2 * per_step, (name, settings)


def test_text_in_chunks_trains_the_same(data):
    found = []
    for chunk in (None, 3):
        student = load_clip("tiny-vit")
        train(student, data, build("apd", text_chunk=chunk, optimizer="sgd"), progress=False)
        found.append(student.adapter.context)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_first_class_embeddings_keep_no_graph(data):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        build("apd", text_chunk=3).setup(load_clip("tiny-vit"), data)
    assert not kept


@pytest.mark.parametrize("name", MORE)
def test_a_step_runs_on_the_fused_ops_and_stays_in_the_ball(data, monkeypatch, name):
    from torch.profiler import profile

    prefixes, batches, method = [], [], build(name, eps="4/255", steps=2)
    attention, loss = ops.prefix_attention, method.loss
    monkeypatch.setattr(ops, "prefix_attention", lambda *args: (prefixes.append(len(args[0])), attention(*args))[1])
    method.loss = lambda adv, clean, batch: (batches.append(batch), loss(adv, clean, batch))[1]
    with profile() as seen:
        train(load_clip("tiny-vit"), data, method, progress=False)
    ran = {event.key.removeprefix("rvlm::") for event in seen.key_averages() if event.key.startswith("rvlm::")}
    assert {"attack_loss"} | ({"multi_teacher_kl"} if name in ("apd", "fap") else set()) <= ran
    assert prefixes, "prompts are tokens of their own"
    for batch in batches:
        if name in ("ivlp", "advpt"):  # whose steps make no images
            assert batch.x_adv is None
            continue
        assert "linf_step_" in ran and (batch.x_adv != batch.x).any()
        assert (
            batch.x_adv - batch.x
        ).abs().max() <= 4 / 255 + 1e-7 and 0 <= batch.x_adv.min() <= batch.x_adv.max() <= 1


def test_prompts_go_to_classes_that_they_were_not_learned_on(data, tmp_path):
    base, new = (load_data(f"digits+classes={part}", "train", limit=64) for part in ("base", "new"))
    train(load_clip("tiny-vit"), base, build("apd"), progress=False, out=tmp_path)
    student = load_clip(str(tmp_path))
    classifier = ZeroShotClassifier(student, new.class_names, new.template)
    assert classifier.templates == ["digit {}."] and classifier.text.shape[1] == 5
    found = evaluate(classifier, new, attack="pgd-2", eps="1/255", progress=False)
    assert found.clean >= found.robust and len(found.y) == 64


def test_a_teacher_of_other_classes_is_refused(data):
    with pytest.raises(ValueError, match=r"returns \[2, 5\] for two images, but digits has 10 classes"):
        teacher = lambda x: x.flatten(1)[:, :5]  # noqa: E731
        train(load_clip("tiny-vit"), data, build("apd", teacher=teacher), progress=False)


def apd_logits(method, batch, adv):
    clean = method.partner.encode_pixels(batch.x)
    return logits(method, adv), logits(method, clean, method.partner)


@pytest.mark.parametrize("settings", [
    {}, {"beta": 0.3}, {"beta": 0.0}, {"beta": 0.3, "beta_mode": "convex"}, {"temperature": 2.0},
    {"student_kl": "student_first", "feedback_kl": "teacher_first"}, {"ce_weight": 0.5, "clean_weight": 0.25},
    {"detach": "none", "beta": 0.3},
])  # fmt: skip
def test_apd_is_its_formula(scene, settings):
    method, batch, adv, clean = scene("apd", same_start=False, **settings)
    config = method.config
    s, t = apd_logits(method, batch, adv)
    tau, fixed = config.temperature, (lambda z: z.detach()) if config.detach == "both" else lambda z: z
    s_first = kl(s / tau, fixed(t) / tau) if config.student_kl == "student_first" else kl(fixed(t) / tau, s / tau)
    back = kl(fixed(s) / tau, t / tau) if config.feedback_kl == "student_first" else kl(t / tau, fixed(s) / tau)
    share = 1 - config.beta if config.beta_mode == "convex" else 1.0
    expected = tau**2 * s_first + share * F.cross_entropy(t, batch.y, reduction="none") + config.beta * tau**2 * back
    expected = expected + config.ce_weight * F.cross_entropy(s, batch.y, reduction="none")
    expected = expected + config.clean_weight * F.cross_entropy(logits(method, clean), batch.y, reduction="none")
    shown = method.loss(adv, clean if config.clean_weight else None, batch)
    torch.testing.assert_close(shown["total"], expected.mean(), rtol=1e-4, atol=1e-5)
    learns = [adv, method.student.adapter.context, *method.partner.adapter.parameters()]
    ours, theirs = (torch.autograd.grad(t, learns, retain_graph=True) for t in (shown["total"], expected.mean()))
    for got, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=2e-5)


def test_a_share_leaves_the_teacher_its_labels():
    assert [build("apd", beta_mode=mode).config.beta for mode in ("add", "convex")] == [1.0, 0.5]


def test_who_moves_whom_in_apd(scene):
    def gradients(**settings):
        method, batch, adv, _ = scene("apd", same_start=False, **settings)
        s, t = apd_logits(method, batch, adv.detach())
        distilled, feedback = method._kl(s, t, True).sum(), method._kl(t, s, True).sum()
        ours, theirs = method.student.adapter.context, method.partner.adapter.context
        return [torch.autograd.grad(of, rows, retain_graph=True, allow_unused=True)[0] is not None
                for of in (distilled, feedback) for rows in (ours, theirs)]  # fmt: skip

    assert gradients() == [True, False, False, True]
    assert gradients(detach="none") == [True, True, True, True]


def test_the_slopes_of_apd(scene):
    """dL_S/dz_S = p_S - p_T, dL_T/dz_T = (p_T - y) + beta (p_T - p_S), with the other one fixed."""
    method, batch, *_ = scene("apd", beta=0.3)
    s, t = (torch.randn(8, 10, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in (0, 1))
    p_s, p_t, y = s.softmax(1), t.softmax(1), F.one_hot(batch.y, 10)
    method.head, method.said = torch.eye(10), t
    d_s, d_t = torch.autograd.grad(8 * method.loss(s, None, batch)["total"], (s, t))
    torch.testing.assert_close(d_s, (p_s - p_t).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(d_t, (p_t - y + 0.3 * (p_t - p_s)).detach(), rtol=1e-4, atol=1e-6)


def test_equal_prompts_on_equal_images_have_nothing_to_distil(scene):
    method, batch, _, clean = scene("apd")
    assert method.loss(clean, None, batch)["distilled"].abs() < 1e-6


def test_the_inner_losses_of_apd(scene):
    for inner, settings in (("kl_teacher", {}), ("kl_teacher", {"teacher": "tiny-rn"}), ("kl_self", {})):
        method, batch, adv, clean = scene("apd", inner_loss=inner, same_start=False, **settings)
        raised = method.attack(batch)(adv)
        if inner == "kl_self":
            said = logits(method, clean)
        elif settings:
            other = load_clip("tiny-rn")
            said = ZeroShotClassifier(other, load_data("digits").class_names, "digits")(batch.x)
        else:
            said = apd_logits(method, batch, adv)[1]
        torch.testing.assert_close(raised, kl(said, logits(method, adv)), rtol=1e-3, atol=1e-4)


def test_a_teacher_without_feedback_does_not_depend_on_the_student(data):
    found = []
    for eps in ("1/255", "8/255"):
        method = build("apd", beta=0.0, eps=eps, lr=2e-2)
        student = load_clip("tiny-vit")
        train(student, data, method, progress=False)
        found.append((method.others["teacher"].adapter.context, student.adapter.context))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])


def test_the_teacher_is_kept_beside_the_student(data, tmp_path):
    method, student = build("apd", lr=2e-2), load_clip("tiny-vit")
    train(student, data, method, progress=False, out=tmp_path)
    names = [name for name, _ in student.named_parameters()]
    assert not any("teacher" in name for name in names)
    x = data.batch(slice(0, 2))[0]
    teacher = load_clip(str(tmp_path / "teacher"))
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), method.others["teacher"](x))
        assert not torch.allclose(teacher(x), student(x), rtol=1e-3, atol=1e-3)
    assert not torch.equal(teacher.adapter.context, student.adapter.context)


@pytest.mark.parametrize("teacher", ["zero_shot", "tiny-rn"])
def test_frozen_teachers_stay(data, teacher):
    method = build("apd", teacher=teacher)
    train(load_clip("tiny-vit"), data, method, progress=False)
    spec = "tiny-vit" if teacher == "zero_shot" else teacher
    by_hand = ZeroShotClassifier(load_clip(spec), data.class_names, "digits").eval()
    with scoring(by_hand):
        expected = by_hand(data.batch(slice(None))[0])
    torch.testing.assert_close(method.teacher.rows, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.teacher(data.batch(slice(None))[0]), expected, rtol=1e-4, atol=1e-5)
    assert method.others == {}


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_teacher_is_tuned_first(data, ema):
    """As ivlp would tune it; the student then begins where it began, and the teacher stays."""
    settings = {"lr": 2e-2, "batch_size": 32, "ema": ema}
    tuned = load_clip("tiny-vit")
    train(tuned, data, build("ivlp", **settings), progress=False)
    method, student, starts = build("apd", teacher="fine_tuned", **settings), load_clip("tiny-vit"), []
    freeze = method._freeze_partner
    method._freeze_partner = lambda: (starts.append(student.adapter.context.clone()), freeze())
    result = train(student, data, method, progress=False)
    assert torch.equal(method.partner.adapter.context, tuned.adapter.context)
    assert torch.equal(method.partner.adapter.prompts, tuned.adapter.prompts)
    assert [row.get("name") for row in result.history] == ["teacher", None]
    words = tuned.model.token_embedding(tuned.tokenizer(["a scan"])[0, 1:3])
    assert len(starts) == 1 and torch.equal(starts[0][0], words)
    plain = ZeroShotClassifier(method.partner, data.class_names).eval()
    with scoring(plain):
        torch.testing.assert_close(method.teacher.rows, plain(data.batch(slice(None))[0]), rtol=1e-4, atol=1e-5)


def test_one_tower_alone(data):
    student, before = load_clip("tiny-rn"), load_clip("tiny-rn").model.state_dict()
    train(student, data, build("apd", visual_tokens=0), progress=False)
    assert all(torch.equal(t, before[key]) for key, t in student.model.state_dict().items()), "statistics of batch norm"
    assert student.adapter.prompts is None and student.adapter.context.shape == (2, 2, 64)
    student = load_clip("tiny-vit")
    train(student, data, build("apd", text_tokens=0), progress=False)
    assert student.adapter.context is None and student.adapter.prompts.shape == (2, 3, 96)


def test_the_best_student_is_no_teacher(data, tmp_path, monkeypatch):
    robust = iter((0.9, 0.8, 0.2))
    monkeypatch.setattr(
        "rvlm.training.trainer._accuracies", lambda *args: {"val_clean": 1.0, "val_robust": next(robust)}
    )
    student, method = load_clip("tiny-vit"), build("apd", teacher="fine_tuned", teacher_epochs=2, lr=2e-2)
    train(student, data, method, progress=False, out=tmp_path, validation=data)
    assert torch.equal(load_clip(str(tmp_path / "best")).adapter.context, student.adapter.context)


def test_a_teacher_with_visual_prompts_alone_is_tuned_first(data):
    method = build("apd", teacher="fine_tuned", text_tokens=0)
    train(load_clip("tiny-vit"), data, method, progress=False)
    by_hand = ZeroShotClassifier(method.partner, data.class_names, "digits").eval()
    with scoring(by_hand):
        torch.testing.assert_close(method.teacher.rows, by_hand(data.batch(slice(None))[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_signs_of_failure(data):
    def signs(student, **settings):
        checks = train(load_clip(student), data, build("apd", **settings), progress=False).checks
        return {check["id"]: check["detail"] for check in checks if not check["ok"]}

    assert "beta=40.0 may be too high" in signs("digits-vit", beta=40.0, eps="8/255", lr=0.05)["teacher_kept"]
    found = signs("digits-vit", beta=0.01, eps="16/255", steps=5, lr=1e-5)
    assert "it is not reliable" in found["feedback_reliable"] and "teacher_kept" not in found
    # Slopes of random towers differ by their depths.
    found = signs("tiny-vit", optimizer="sgd", clip_grad=None, beta=0.0)
    assert "collapsed to one tower" in found["both_towers_learn"]


def test_bad_settings_and_towers(data):
    for name, settings, message in (
        ("advvp", {"visual_tokens": -1}, "visual_tokens must be at least 0"),
        ("advvp", {"visual_tokens": 0}, "nothing to learn"),
        ("advvp", {"text_tokens": 2}, "visual prompts alone: for text_tokens, use advvlp"),
        ("apt", {"visual_tokens": 2}, "a context alone: for visual_tokens, use advvlp"),
        ("apt", {"adversary": "none"}, "adversary must be one of onfly"),
        ("advvlp", {"visual_depth": 0}, "visual_depth must be at least 1"),
        ("advvlp", {"sentence": "of a"}, "sentence must contain {}"),
        ("advvlp", {"text_chunk": 0}, "text_chunk must be at least 1"),
        ("advmaple", {"visual_tokens": 3}, "coupled prompts are as many here as there"),
        ("advmaple", {"visual_depth": 3}, "needs text_depth to be at least visual_depth"),
        ("fap", {"visual_depth": 1}, "needs visual_depth to be at least text_depth"),
        ("fap", {"trade_off": -1.0}, "trade_off must be at least 0"),
        ("fap", {"random_start": False}, "fap's attack has no slope at the clean image"),
        ("apd", {"inner_loss": "kl_self", "random_start": False}, "no slope at the clean image"),
        ("apd", {"beta": -1.0}, "beta must be at least 0"),
        ("apd", {"beta": 2.0, "beta_mode": "convex"}, "a beta of at most 1"),
        ("advpt", {"momentum": 0.9}, "momentum must be 0"),
        ("apd", {"inner_loss": "dlr"}, "inner_loss must be one of ce"),
        ("apd", {"temperature": 0.0}, "temperature must be above 0"),
        ("apd", {"teacher_epochs": 0}, "teacher_epochs must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(name, **settings)
    for student, settings, message in (
        ("tiny-rn", {}, "no blocks that can be adapted"),
        ("tiny-vit", {"visual_depth": 4}, "tiny-vit has 3 blocks"),
        ("tiny-vit", {"text_depth": 3}, "context for 3 blocks, but tiny-vit has 2"),
        ("tiny-vit", {"text_tokens": 14}, "reads 16 tokens, but context and longest text have"),
    ):
        with pytest.raises(ValueError, match=message):
            train(load_clip(student), data, build("advvlp", **settings), progress=False)
    student = load_clip("tiny-vit")
    for settings in ({"text_tokens": 14}, {"teacher": lambda x: x.flatten(1)[:, :3]}):
        with pytest.raises(ValueError, match="context and longest text|digits has 10 classes"):
            train(student, data, build("apd", **settings), progress=False)
        assert student.adapter is None, "prompts of a run that never began"
    train(student, data, build("advvp"), progress=False)
    with pytest.raises(ValueError, match="has an adapter already"):
        train(student, data, build("advvp"), progress=False)


def test_the_model_without_prompts_shares_its_weights(scene):
    method, *_ = scene("advvlp")
    ours, plain = method.student, method.undefended
    assert plain.adapter is None and plain.model.visual.conv1.weight is ours.model.visual.conv1.weight
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(plain(x), load_clip("tiny-vit", seed=1)(x))
    assert not torch.allclose(plain(x), ours(x))
