"""What methods share that learn prompts for a frozen CLIP: where they stand, how they begin, what ties them together.

    image tokens of block l   (x, P_l)                      P [J_v, visual_tokens, D_v]     (see rvlm.models.adapter)
    text tokens of block l    <start> V_l sentence <end>    V [J_t, text_tokens, D_t]       (see rvlm.models.text)

coupling    independent       P and V learn by themselves (IVLP)
            text_to_vision    P_l = F_l V_l, with a linear map for each block (MaPLe)
            vision_to_text    V_l = F_l P_l in the blocks behind the first, whose V_0 learns by itself (FAP)

Maps are needed to train and not to run: what is saved are P and V. Class embeddings are computed once a step, with
their graph, and are constants of the inner attack; with visual prompts alone they are so in all steps.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rvlm.data import Data
from rvlm.methods.base import MethodConfig, VisionMethod
from rvlm.methods.teachers import twin
from rvlm.models import Adapter, Clip, apply_adapter
from rvlm.models.adapter import AdapterConfig
from rvlm.models.text import encode, tokenized, word_embeddings
from rvlm.models.towers import text_tower, tower_of
from rvlm.models.zero_shot import text_head

__all__ = ["LAB", "PromptConfig", "PromptMethod"]

COUPLINGS = ("independent", "text_to_vision", "vision_to_text")
LAB = {
    "optimizer": "sgd", "lr": 0.0035, "weight_decay": 5e-4, "batch_size": 32, "epochs": 50, "eps": "1/255",
    "alpha": 1 / 255, "steps": 2,
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class PromptConfig(MethodConfig):
    visual_tokens: int = 2
    """Prompts in each block of the vision tower; 0 is none."""
    visual_depth: int = 9
    """Blocks of it with prompts of their own, from the first."""
    text_tokens: int = 2
    """Context tokens in each block of the text tower; 0 is none: then classes are named by `templates`."""
    text_depth: int = 9
    """Blocks of it with a context of their own, from the first."""
    words: str = "a photo"
    """What the context begins as, if these are text_tokens tokens; else it begins as noise."""
    sentence: str = "of a {}."
    """What follows the context in every text, with {} for the class."""
    coupling: str = "independent"
    """independent, text_to_vision or vision_to_text."""
    init_std: float = 0.02
    """Standard deviation of prompts that begin as noise."""
    text_chunk: int | None = None
    """Classes whose texts are run at a time, and again in the backward pass, to save memory; None is all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_of(coupling=COUPLINGS)
        self.at_least(0, "visual_tokens", "text_tokens")
        self.at_least(1, "visual_depth", "text_depth")
        if not self.visual_tokens and not self.text_tokens:
            raise ValueError("there is nothing to learn: visual_tokens or text_tokens must be above 0")
        if self.text_tokens and "{}" not in self.sentence:
            raise ValueError(f"sentence must contain {{}} for the class name, got {self.sentence!r}")
        if self.text_chunk is not None and self.text_chunk < 1:
            raise ValueError(f"text_chunk must be at least 1, or None, got {self.text_chunk}")
        if self.coupling != "independent":
            if self.visual_tokens != self.text_tokens:
                raise ValueError(
                    f"coupled prompts are as many here as there, got visual_tokens={self.visual_tokens} and "
                    f"text_tokens={self.text_tokens}"
                )
            of, on = ("text", "visual") if self.coupling == "text_to_vision" else ("visual", "text")
            if getattr(self, f"{of}_depth") < getattr(self, f"{on}_depth"):
                raise ValueError(f"coupling {self.coupling} needs {of}_depth to be at least {on}_depth")


class PromptMethod(VisionMethod):
    """A method that learns prompts.

    Attributes, after setup:
        student: the model, with an adapter that learns.
        head: [D, C], the scale times the class embeddings, of this step where the context learns.
        undefended: the model without prompts.
    """

    Config = PromptConfig
    trains_tower = False

    def setup(self, student: Clip, data: Data) -> None:
        if student.adapter is not None:
            raise ValueError(f"{student.name} has an adapter already: start from the model without it")
        self.student, config = student, self.config
        student.requires_grad_(False)
        self.undefended = twin(student)
        self.texts = None
        if config.text_tokens:
            self.texts = tokenized(student, [config.sentence.format(name) for name in data.class_names])
        self.prompt(student)
        # With a context too, so that one too long for the tower is an error here. A graph would hold all classes.
        with torch.no_grad():
            self.head = student.logit_scale * text_head(student, data.class_names, self.training_templates(data))

    def prompt(self, clip: Clip) -> None:
        """Puts prompts that learn around a model, as they are at first: noise, by torch's generator, and words."""
        config = self.config
        adapter = apply_adapter(clip, Adapter(
            AdapterConfig.of(clip, source=self.name, sentence=config.sentence if config.text_tokens else ""),
            prompts=self._prompts(clip), context=self._context(clip),
        )).adapter  # fmt: skip
        for rows in (adapter.prompts, adapter.context):
            if rows is not None:
                rows.requires_grad_(True)
        if config.coupling == "text_to_vision":
            _couple(adapter, "prompts", "context", 0)
        elif config.coupling == "vision_to_text" and config.text_depth > 1:
            _couple(adapter, "context", "prompts", 1)

    def _prompts(self, clip: Clip) -> Tensor | None:
        config = self.config
        if not config.visual_tokens:
            return None
        tower = tower_of(clip)
        tower.block(config.visual_depth - 1)  # or an error that says how many there are
        return torch.randn(config.visual_depth, config.visual_tokens, tower.width) * config.init_std

    def _context(self, clip: Clip) -> Tensor | None:
        config = self.config
        if not config.text_tokens:
            return None
        width = text_tower(clip).positional_embedding.shape[1]
        rows = torch.randn(config.text_depth, config.text_tokens, width) * config.init_std
        words = word_embeddings(clip, config.words)
        if len(words) == config.text_tokens:
            rows[0] = words.detach()
        return rows

    def encode_text(self) -> Tensor:
        """The head [D, C] as the context is now, with its graph; kept for the rest of the step."""
        if self.texts is not None:
            self.head = self.class_head(self.student.adapter.context)
        return self.head

    def class_head(self, context: Tensor) -> Tensor:
        """The head [D, C] of a context, with its graph."""
        return self.student.logit_scale * encode(self.student, self.texts, context, self.config.text_chunk).T

    def finish(self) -> None:
        self.uncouple(self.student.adapter)

    def uncouple(self, adapter: Adapter) -> None:
        """Makes rows what they are as images of others, and forgets the maps."""
        for name in ("prompts", "context"):
            if parametrize.is_parametrized(adapter, name):
                parametrize.remove_parametrizations(adapter, name)


def _couple(adapter: Adapter, derived: str, source: str, first: int) -> None:
    """Makes the rows of blocks from `first` on linear maps of another tower's."""
    rows = getattr(adapter, derived)
    coupled = _Coupled(getattr(adapter, source), rows, first)
    parametrize.register_parametrization(adapter, derived, coupled)
    adapter.parametrizations[derived].original.requires_grad_(first > 0)


class _Coupled(nn.Module):
    """Rows [J, P, D], of which those of blocks from `first` on are linear maps of the other tower's."""

    def __init__(self, source: nn.Parameter, rows: Tensor, first: int) -> None:
        super().__init__()
        self.source, self.first = source, first
        widths = {"in_features": source.shape[2], "out_features": rows.shape[2], "device": rows.device}
        self.maps = nn.ModuleList(nn.Linear(**widths) for _ in rows[first:])

    def forward(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):  # prompts stay in fp32, whoever asks for them
            mapped = [of(self.source[number]) for number, of in enumerate(self.maps, self.first)]
            return torch.cat([rows[: self.first], torch.stack(mapped)])
