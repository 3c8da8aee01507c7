"""Radii in pixel units that remember how they were written: "4/255" is a number and a name."""

import re

__all__ = ["Eps"]


class Eps(float):
    """A radius: `Eps("4/255") == 4 / 255`, `str(Eps("4/255")) == "4/255"`. Also takes numbers."""

    text: str

    def __new__(cls, value: "str | float | Eps") -> "Eps":
        if isinstance(value, Eps):
            return value
        text = str(value).strip()
        upper, slash, lower = text.partition("/")
        try:
            number = float(upper) / (float(lower) if slash else 1.0)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"eps must be a fraction such as 4/255 or a number such as 0.0157, got {text!r}") from None
        if not 0 <= number < float("inf"):
            raise ValueError(f"eps must be finite and not negative, got {text!r}")
        self = super().__new__(cls, number)
        self.text = text if slash or isinstance(value, str) else _as_fraction(number)
        return self

    def check(self, norm: str) -> "Eps":
        """Raises ValueError if a Linf radius spans the pixel range."""
        if norm == "linf" and self >= 1:
            raise ValueError(f"Linf eps is in pixel units [0, 1), got {self.text}: did you mean {self.text}/255?")
        return self

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        """A width alone aligns what was written; all else, as ".4f", formats the number."""
        return format(self.text, spec) if re.fullmatch(r"(.?[<>^])?([1-9]\d*)?s?", spec) else super().__format__(spec)

    def __repr__(self) -> str:
        return f"Eps({self.text!r})"

    def __reduce__(self):
        return Eps, (self.text,)


def _as_fraction(number: float) -> str:
    """k/255 where that is what was meant, else the number."""
    k = number * 255
    return f"{round(k)}/255" if 0 < number < 1 and abs(k - round(k)) < 1e-9 * 255 else f"{number:g}"
