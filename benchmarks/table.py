"""What the case `methods` found, as a Markdown table.

    python benchmarks/run.py methods --output DIR
    python -m benchmarks.table DIR
"""
import inspect
import json
import sys
from pathlib import Path

from distillers import DISTILLERS
from distillers.flags import first_line, notes


def markdown(records: list[dict]) -> str:
    rows = [('`--distiller`', 'method', 'looks at', 'extra parameters', 'cost of a step', 'defaults from'),
            ('---', '---', '---', '--:', '--:', '---')]
    for record in records:
        method = DISTILLERS[record['variant']]
        paper, source = first_line(inspect.getmodule(method)), notes(method)['Defaults']
        rows.append((f'`{record["variant"]}`', paper.rstrip('.'), record['features'], f'{record["parameters"]:,}',
                     f'{record["ratio"]:.2f}', source.rstrip('.')))
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


if __name__ == '__main__':
    rows = json.loads((Path(sys.argv[1]) / 'bench.json').read_text())['rows']
    print(markdown([row for row in rows if row['case'] == 'methods']))
