"""What all sections of params.yaml are."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Immutable and closed: an unknown key is an error. A field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
