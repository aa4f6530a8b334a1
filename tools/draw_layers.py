"""Draws which room of dsclip imports which, in the order of the layers, as the figure of docs/how_it_works.md.

Where the lint tools are installed (make lint):   python tools/draw_layers.py docs/images/layers.svg

The order is that of import-linter's contract in pyproject.toml, the imports are those of its graph, lazy ones included.
An arrow that ran back up would be drawn in red, and the exit code would be 1.
"""

import argparse
import sys
from html import escape
from pathlib import Path

from dsclip.command_line import parser, run_tool
from dsclip.errors import RunFailed, UserError

ROOT = Path(__file__).parent.parent
ROW, BOX_WIDTH, BOX_HEIGHT, LEFT, TOP = 38, 150, 24, 130, 16
STYLE = """
  text { font: 13px sans-serif; fill: #1f2933 } .side { fill: #7b8794; font-size: 11px }
  rect { fill: #e4edf7; stroke: #486581; rx: 5 } .arrow { fill: none; stroke: #627d98; stroke-width: 1.2; opacity: .55 }
  .paper { fill: white; stroke: none }
  .arrow:hover { stroke: #b44d12; stroke-width: 3; opacity: 1 } .up { stroke: #d64545; stroke-width: 3; opacity: 1 }
"""


def layers() -> list[list[str]]:
    """The rooms of each layer, uppermost first."""
    try:
        from importlinter.api import read_configuration
    except ImportError as error:
        raise UserError(f"import-linter is not installed ({error}); `make lint` installs it") from error
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    rows = next(c for c in contracts if c["name"] == "layers")["layers"]
    return [[room.strip() for room in row.replace(":", "|").split("|")] for row in rows]


def imports_between_rooms() -> dict[tuple[str, str], int]:
    """{(importing room, imported room): how many imports}, lazy ones included."""
    import grimp

    graph, found = grimp.build_graph("dsclip"), {}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = (module.split(".")[1:2], imported.split(".")[1:2])
            if all(pair) and pair[0] != pair[1]:
                key = (pair[0][0], pair[1][0])
                found[key] = found.get(key, 0) + 1
    return found


def arrow(above: int, below: int, number: int, title: str, kind: str) -> str:
    """An arc right of the boxes from one row to another; the wider, the further apart. number: staggers arrows' ends."""
    start, end = (TOP + row * ROW + BOX_HEIGHT / 2 for row in (above, below))
    x, bend = LEFT + BOX_WIDTH, LEFT + BOX_WIDTH + 14 + 15 * abs(below - above)
    start, end = start + 4, end - 6 + number
    path = f"M {x} {start:.1f} C {bend} {start:.1f}, {bend} {end:.1f}, {x + 3} {end:.1f}"
    return f'<path class="{kind}" d="{path}" marker-end="url(#tip)"><title>{escape(title)}</title></path>'


def draw(rows: list[list[str]], imports: dict[tuple[str, str], int]) -> tuple[str, list[str]]:
    """(the figure as SVG, the arrows that run back up)."""
    rooms = [room for row in rows for room in row]
    place, back_up, parts = {room: i for i, room in enumerate(rooms)}, [], []
    height = 2 * TOP + ROW * len(rooms)
    width = LEFT + BOX_WIDTH + 40 + 12 * len(rooms)
    for n, ((importer, imported), count) in enumerate(sorted(imports.items())):
        if importer in place and imported in place:
            up = place[importer] > place[imported]
            title = f"{importer} imports {imported} ({count})"
            back_up += [title] * up
            parts.append(arrow(place[importer], place[imported], n % 4 * 3, title, "arrow up" if up else "arrow"))
    for i, room in enumerate(rooms):
        y = TOP + i * ROW
        box = f'<rect x="{LEFT}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}"/>'
        parts.append(f'{box}<text x="{LEFT + 10}" y="{y + 17}">{escape(room)}</text>')
    for row in rows:
        for room in row[1:]:
            y = TOP + place[room] * ROW + 16
            parts.append(f'<text class="side" x="{LEFT - 8}" y="{y}" text-anchor="end">beside {escape(row[0])}</text>')
    tip = '<marker id="tip" markerWidth="7" markerHeight="6" refX="6" refY="3" orient="auto"><path d="M0 0 L7 3 L0 6z" fill="#486581"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return "\n".join(
        [
            head,
            f"<style>{STYLE}</style><defs>{tip}</defs>",
            '<rect class="paper" width="100%" height="100%"/>',
            *parts,
            "</svg>",
            "",
        ]
    ), back_up


def tool(arguments: argparse.Namespace) -> tuple[dict, str]:
    """Writes the figure; raises RunFailed when an import runs back up."""
    rows, imports = layers(), imports_between_rooms()
    figure, back_up = draw(rows, imports)
    arguments.figure.write_text(figure, encoding="utf-8")
    if back_up:
        raise RunFailed(f"{len(back_up)} arrows run back up: {'; '.join(back_up)}")
    result = {"rooms": sum(map(len, rows)), "arrows": len(imports), "back_up": 0}
    return result, f"{arguments.figure}: {result['rooms']} rooms, {len(imports)} arrows, none back up"


def main(argv: list[str] | None = None) -> int:
    """Command-line entry."""
    made = parser("Draws which room imports which.", "python tools/draw_layers.py docs/images/layers.svg")
    made.add_argument("figure", type=Path, help="the SVG file to write")
    return run_tool(tool, made.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
