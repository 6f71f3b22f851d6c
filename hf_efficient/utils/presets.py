"""Published settings of a config by name."""

from typing import Any, ClassVar, Self


class PresetMixin:
    """
    Named presets of a config class: `Config.preset("name")` builds one, `Config.presets()` lists the names.

    A class that inherits this lists them in `published_settings`: the fields that differ from its defaults, by name.
    """

    published_settings: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def presets(cls) -> list[str]:
        """The names that [`preset`] takes, in the order of publication."""
        return list(cls.published_settings)

    @classmethod
    def preset_fields(cls, name: str) -> dict[str, Any]:
        """
        The fields of a preset that differ from the defaults.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in cls.published_settings:
            raise ValueError(
                f"{cls.__name__} has no preset {name!r}. Its presets are: {', '.join(cls.published_settings)}."
            )
        return dict(cls.published_settings[name])

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """
        A published configuration.

        Args:
            name (`str`): one of [`presets`].
            overrides: fields that replace those of the preset.

        Raises:
            ValueError: if there is no preset of that name.
        """
        return cls(**{**cls.preset_fields(name), **overrides})
