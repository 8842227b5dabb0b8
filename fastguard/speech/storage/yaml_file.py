"""Reads YAML files of settings, without YAML features that make small files huge in memory."""

from pathlib import Path

import yaml

from fastguard._io import files

_LARGEST = 1 << 16  # bytes; all settings with their comments have a few thousand


class _Loader(yaml.SafeLoader):
    """Refuses aliases, with which a short file can become very large in memory, and duplicate keys,
    of which YAML silently uses the last."""

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
                        None, None, f"the key {key.value} occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """The value in the file, of any type.

    Raises:
        OSError: the file is not a regular file, too large for settings, or cannot be read.
        ValueError: it is not YAML in UTF-8, or has aliases or duplicate keys; one line says where.
    """
    try:
        return yaml.load(files.read_text(path, _LARGEST), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("brackets nested too deep; settings have two levels") from None
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        # PyYAML raises these for a malformed tag, such as !!timestamp with another value
        raise ValueError(f"it cannot be read as YAML: {error}") from error
