"""Write the reference of all commands from click's own help, at build: the directive `commands`."""

import click
from docutils import nodes
from docutils.parsers.rst import Directive

from pipeline.cli import commands

WIDTH = 100


def helps(group: click.Group, context: click.Context) -> list[tuple[str, str]]:
    """Return the name and the help of each command as it is typed, in the order of work."""
    found = []
    for name in group.list_commands(context):
        command = group.commands[name]
        inner = click.Context(command, info_name=name, parent=context, max_content_width=WIDTH, terminal_width=WIDTH)
        inner.show_default = True
        found.append((inner.command_path, command.get_help(inner)))
        if isinstance(command, click.Group):
            found += helps(command, inner)
    return found


class Commands(Directive):
    """A section of each command, which holds what `--help` prints."""

    def run(self) -> list[nodes.Node]:
        sections = []
        for name, text in helps(commands, click.Context(commands, info_name="pipeline")):
            section = nodes.section(ids=[name.replace(" ", "-")], names=[name])
            section += [nodes.title(text=name), nodes.literal_block(text, text, language="text")]
            self.state.document.note_implicit_target(section, section)
            sections.append(section)
        return sections


def setup(app) -> dict:
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
