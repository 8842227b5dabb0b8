"""YAML files of settings, read without what settings never need and a bomb is made of."""

from pathlib import Path

import yaml

from fastguard._io import files

_LARGEST = 1 << 16  # bytes; all settings with their comments take a few thousand


class _Loader(yaml.SafeLoader):
    """Refuses aliases, with which a short file becomes an endless one, and a key that comes twice,
    of which YAML takes the last in silence."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{alias.anchor} is an alias: write the value itself", alias.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value} comes twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """What the file holds, of any type.

    Raises:
        OSError: it is no regular file, too large for settings, or cannot be read.
        ValueError: it is no YAML in UTF-8, or has aliases or a key twice; one line says where.
    """
    try:
        return yaml.load(files.read_text(path, _LARGEST), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("brackets nested too deep; settings have two levels") from None
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        # PyYAML's own of a malformed tag, such as !!timestamp of something else
        raise ValueError(f"it cannot be read as YAML: {error}") from error
