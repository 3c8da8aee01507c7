"""LVLMs of transformers as modules from pixels in [0, 1] and words to answers and their likelihood.

    loss of an answer a_1 .. a_n to a question q about x:   -1/n sum_k log p(a_k | x, q, a_1 .. a_{k-1})

Resizing and normalisation are inside the model and in its graph. One image per question; batches are padded on the
left, which attention masks hide, so that answers end together and logits are computed for their places alone.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvlm.data.prompts import fingerprint
from rvlm.lvlm.pixels import Pixels, QwenPixels
from rvlm.models import Adapter
from rvlm.models.weights import settings_of, weights_sha

__all__ = ["FAMILIES", "AnswerLoss", "Lvlm", "load_lvlm", "what_answers"]

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}  # fp16 gradients underflow
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}  # whatever is stored beside the model
QWEN_SIZE = 448  # pixels, a multiple of what both families ask for
QWEN_PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"  # no template
)


@dataclasses.dataclass(frozen=True)
class Family:
    """How a kind of model is named, where its vision tower is, and how it is asked without a chat template."""

    model: str
    tower: str
    prompt: str


FAMILIES = {
    "llava": Family("LlavaForConditionalGeneration", "model.vision_tower", "USER: <image>\n{} ASSISTANT:"),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", "model.visual", QWEN_PROMPT),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", "model.visual", QWEN_PROMPT),
}


class Lvlm(nn.Module):
    """An LVLM. Adapters (`rvlm.models.apply_adapter`) stand around its vision tower as around a CLIP's.

    Args:
        model: of one of FAMILIES.
        tokenizer, processor: its tokenizer and image processor.
        name: where it is from.
        size: height and width of the images that it sees; others are resized. None: the tower's own, or 448 for
            Qwen-VL, which takes any multiple of its patches.

    Raises:
        ValueError: another kind of model, or a size that it cannot take.
    """

    pools_tokens = False  # the language model reads them all, so that adapters cannot hold prompts

    def __init__(
        self, model: nn.Module, tokenizer, processor, *, name: str = "custom", size: int | None = None
    ) -> None:
        super().__init__()
        kind = model.config.model_type
        if kind not in FAMILIES:
            raise ValueError(f"{name} is a {kind}: expected one of {', '.join(FAMILIES)}")
        self.model, self.tokenizer, self.name, self.family = model, tokenizer, name, FAMILIES[kind]
        self.register_module("adapter", None)
        about = model.config.vision_config
        if kind == "llava":
            if about.model_type != "clip_vision_model":
                raise ValueError(f"{name} sees through a {about.model_type}: expected LLaVA-1.5, which has a CLIP")
            if size not in (None, about.image_size):
                raise ValueError(f"{name} takes images of {about.image_size} pixels, got size={size}")
            self.size = about.image_size
            self.pixels = Pixels(processor, self.size)
            whole = model.config.vision_feature_select_strategy == "full"
            self.image_tokens = (self.size // about.patch_size) ** 2 + whole
        else:
            self.size = size or QWEN_SIZE
            self.pixels = QwenPixels(processor, self.size)
            self.image_tokens = (self.size // about.patch_size // about.spatial_merge_size) ** 2

    @property
    def visual(self) -> nn.Module:
        """The vision tower."""
        return self.model.get_submodule(self.family.tower)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def settings(self) -> dict[str, str]:
        """What decides answers and is no weight: the words around a question, by their hash."""
        return {"prompt": fingerprint([getattr(self.tokenizer, "chat_template", None) or self.family.prompt])}

    def see(self, x: Tensor) -> dict[str, Tensor]:
        """The model's inputs for pixels [B, 3, H, W] in [0, 1], behind the adapter's filter."""
        if self.adapter is not None:
            x = self.adapter.filter(x)
        return self.pixels(x)

    def encode_pixels(self, x: Tensor) -> Tensor:
        """What the language model gets to see of pixels [B, 3, H, W] in [0, 1]: [B, tokens, D]."""
        return torch.stack(list(self.model.get_image_features(**self.see(x)).pooler_output))

    def answer(self, x: Tensor, questions: list[str], max_tokens: int = 20) -> list[str]:
        """Answers to a question for each image, the likeliest word at a time, of at most max_tokens."""
        text = self.read([self.asked(question) for question in questions])
        with torch.no_grad():
            said = self.model.generate(**self.see(x), **text, max_new_tokens=max_tokens, **GREEDY)
        words = said[:, text["input_ids"].shape[1] :]
        return [answer.strip() for answer in self.tokenizer.batch_decode(words, skip_special_tokens=True)]

    def asked(self, question: str) -> list[int]:
        """Tokens of a question about an image, by the tokenizer's chat template if it has one."""
        tokenizer, image = self.tokenizer, self.model.config.image_token_id
        if getattr(tokenizer, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            turns = [{"role": "user", "content": content}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = self.family.prompt.format(question)
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not begun)["input_ids"]
        if ids.count(image) != 1:
            raise ValueError(
                f"{self.name}: a question must hold its image's token once, got {ids.count(image)} times in {text!r}; "
                "do the tokenizer and its chat template belong to this model?"
            )
        at = ids.index(image)
        return ids[:at] + [image] * self.image_tokens + ids[at + 1 :]

    def said(self, answer: str) -> list[int]:
        """Tokens of an answer; of an empty one, the token that ends it."""
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"] or [self.tokenizer.eos_token_id]

    def read(self, texts: list[list[int]]) -> dict[str, Tensor]:
        """The model's inputs for tokens of texts, padded on the left."""
        length = max(map(len, texts))
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, length - len(text) :] = torch.tensor(text)
            mask[row, length - len(text) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if isinstance(self.pixels, QwenPixels):  # whose positions depend on where images are
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return {name: t.to(self.device) for name, t in inputs.items()}


class AnswerLoss(nn.Module):
    """Pixels [B, 3, H, W] in [0, 1] -> mean negative log-likelihood of the tokens of each image's answer, [B], fp32.

    For attacks: pgd(AnswerLoss(lvlm, questions, answers), x, loss=rvlm.attacks.losses.given, best="loss"), and
    targeted=True to make the answers likelier.
    """

    def __init__(self, lvlm: Lvlm, questions: list[str], answers: list[str]) -> None:
        super().__init__()
        if not questions or len(questions) != len(answers):
            raise ValueError(f"expected an answer for each question, got {len(questions)} and {len(answers)}")
        self.lvlm = lvlm
        said = [lvlm.said(answer) for answer in answers]
        self.text = lvlm.read([lvlm.asked(question) + words for question, words in zip(questions, said, strict=True)])
        self.longest = max(map(len, said))
        target = torch.full((len(said), self.longest), -100)
        for row, words in enumerate(said):
            target[row, self.longest - len(words) :] = torch.tensor(words)
        self.register_buffer("target", target.to(lvlm.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(self.target):
            raise ValueError(f"expected {len(self.target)} images, one for each question, got {len(x)}")
        given = {**self.lvlm.see(x), **self.text, "use_cache": False, "logits_to_keep": self.longest + 1}
        logits = self.lvlm.model(**given).logits[:, :-1].float()
        words = F.cross_entropy(logits.mT, self.target, reduction="none", ignore_index=-100)
        return words.sum(1) / self.target.ne(-100).sum(1)


def load_lvlm(
    source: str, device: str | torch.device = "cpu", *, dtype: str = "auto", size: int | None = None,
    adapter: "Adapter | str | None" = None,
) -> Lvlm:  # fmt: skip
    """Loads an LVLM of transformers, frozen and in eval mode.

    Args:
        source: a folder with model, tokenizer and image processor, or a name on the hub.
        device: where to put it.
        dtype: fp32, bf16, or auto: as it is stored, and bf16 where that is fp16, whose gradients underflow.
        size: see Lvlm.
        adapter: what to put around its tower, or a folder of one (also one that was made for the same CLIP tower).

    Raises:
        ImportError: without transformers. FileNotFoundError: nothing there. ValueError: another kind of model.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'LVLMs need transformers: pip install "rvlm[lvlm]" ({error})') from error
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    missing = (
        f"no LVLM with tokenizer and image processor at {source}: expected a folder of transformers, or a hub name"
    )
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(missing)
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        if config.model_type not in FAMILIES:
            raise ValueError(f"{source} is a {config.model_type}: expected one of {', '.join(FAMILIES)}")
        stored = torch.bfloat16 if config.dtype == torch.float16 else "auto"
        kind = getattr(transformers, FAMILIES[config.model_type].model)
        model = kind.from_pretrained(source, dtype=DTYPES[dtype] or stored)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        processor = transformers.AutoImageProcessor.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(f"{missing} ({error})") from error
    lvlm = Lvlm(model, tokenizer, processor, name=source, size=size).to(device).eval().requires_grad_(False)
    if adapter is not None:
        (adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)).attach(lvlm)
    return lvlm


def what_answers(lvlm: Lvlm, adapter: Adapter | None) -> dict[str, Any]:
    """A model without its adapter, and the adapter, by their content: as records of answers hold them."""
    return {
        "model_sha": weights_sha(lvlm), "model_settings": settings_of(lvlm), "dtype": str(lvlm.model.dtype),
        "adapter": adapter and dataclasses.asdict(adapter.config), "adapter_sha": adapter and weights_sha(adapter),
    }  # fmt: skip
