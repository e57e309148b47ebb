"""What the scripts share: how they read a run's folder, without a complaint or with one, refuse, and name pictures."""
import json
import sys
from pathlib import Path


def refuse(line):
    print(line, file=sys.stderr)
    sys.exit(2)


def png(name: str) -> Path:
    """The file of a picture, as a flag names it."""
    return Path(name) if Path(name).suffix else Path(name).with_suffix('.png')


def read_json(path) -> dict | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def records(lines):
    """The records of a run in the order of its epochs, of an epoch that was run again the last; and the torn lines."""
    found, torn = {}, []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record['lr'], record['train']['loss'], record['train']['top1']
            found[record['epoch']] = record
        except (ValueError, KeyError, TypeError):
            torn.append(number)
    return [found[epoch] for epoch in sorted(found)], torn


def read_log(out):
    path = out / 'log.jsonl'
    try:
        lines = path.read_text(errors='replace').splitlines()
    except OSError as error:
        refuse(f'{path}: {error.strerror}')
    found, torn = records(lines)
    if wrong := [number for number in torn if number < len(lines)]:  # the last one may only be half-written
        refuse(f'{path}: line {wrong[0]} is not the record of an epoch')
    if not found:
        refuse(f'{path}: no epoch yet')
    return found


def series(records, split, key):
    """Epochs and values of those epochs that have the split: validation may be rare."""
    points = [(record['epoch'], record[split][key]) for record in records if record.get(split)]
    return tuple(zip(*points, strict=True)) or ((), ())
