"""Charts as SVG that stands in a page: colours are the page's (--s0 ...), so they follow its light and dark."""
import json
import math
from html import escape

import numpy as np


def ticks(low, high, count=5):
    """Round numbers from low to high."""
    span = high - low or abs(high) or 1
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= count)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def powers(low, high):
    """Powers of ten, or where they are few their halves and fifths too."""
    found = [m * 10 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
             for m in ((1,) if high / low > 1000 else (1, 2, 5))]
    inside = [v for v in found if low * 0.999 <= v <= high * 1.001]
    return inside if len(inside) > 1 else ticks(low, high)


def number(value):
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


class Axes:
    """A frame with ticks, from data to pixels."""

    def __init__(self, xs, ys, *, size=(440, 240), log=False, whole=False, margin=(46, 12, 12, 34)):
        self.width, self.height = size
        self.left, self.right, self.top, self.bottom = margin[0], size[0] - margin[1], margin[2], size[1] - margin[3]
        self.log = log
        self.x0, self.x1 = min(xs, default=0), max(xs, default=1)
        if self.x0 == self.x1:
            self.x0, self.x1 = self.x0 - 0.5, self.x1 + 0.5
        low, high = min(ys, default=0), max(ys, default=1)
        if log:
            self.y0, self.y1 = low / 1.3, high * 1.3
        elif whole:
            self.y0, self.y1 = low, high
        else:
            room = 0.06 * (high - low) or abs(high) / 10 or 1
            self.y0, self.y1 = (0 if 0 <= low < 0.3 * high else low - room), high + room

    def x(self, value):
        return round(self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left), 1)

    def y(self, value):
        a, b, v = (math.log(max(u, 1e-30)) if self.log else u for u in (self.y0, self.y1, value))
        return round(self.bottom - (v - a) / (b - a) * (self.bottom - self.top), 1)

    def frame(self, label, whole_x=True):
        parts = []
        for value in (powers if self.log else ticks)(self.y0, self.y1):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left} {y}H{self.right}"/>'
                         f'<text class="end" x="{self.left - 6}" y="{y + 4}">{number(value)}</text>')
        for value in ticks(self.x0, self.x1, 8):
            if value == int(value) or not whole_x:
                parts.append(f'<text class="mid" x="{self.x(value)}" y="{self.bottom + 15}">{number(value)}</text>')
        middle = (self.left + self.right) / 2
        return ''.join(parts) + f'<text class="mid name" x="{middle}" y="{self.height - 3}">{escape(label)}</text>'

    def line(self, points):
        return 'M' + 'L'.join(f'{self.x(x)} {self.y(y)}' for x, y in points)


def figure(title, note, body, size, data=None, extra=''):
    told = f'<small>{escape(note)}</small>' if note else ''
    shown = f" data-chart='{escape(json.dumps(data))}'" if data else ''
    return (f'<figure{shown}><figcaption><b>{escape(title)}</b>{told}{extra}</figcaption><svg viewBox="0 0 {size[0]} '
            f'{size[1]}" role="img" aria-label="{escape(title)}">{body}</svg></figure>')


def key(lines):
    """The names of lines beside their colours."""
    return '<span class="key">' + ''.join(
        f'<span><i class="{"dash" if line.get("dash") else ""}" style="--c:{line["colour"]}"></i>{escape(line["name"])}'
        '</span>' for line in lines) + '</span>'


def curves(title, lines, *, note='', log=False, levels=()):
    """lines: {name, colour, runs: a list of [(x, y)] each}: their mean in the band of their range.

    levels: {name, colour, value}, drawn dashed over the whole width.
    """
    drawn = []
    for line in lines:
        columns = {}
        for run in line['runs']:
            for x, y in run:
                if math.isfinite(y) and (y > 0 or not log):
                    columns.setdefault(x, []).append(y)
        if columns:
            drawn.append(line | {'columns': sorted(columns.items())})
    levels = [level for level in levels if level['value'] is not None]
    if not drawn:
        return missing(title)
    xs = [x for line in drawn for x, _ in line['columns']]
    ys = [y for line in drawn for _, column in line['columns'] for y in column] + [level['value'] for level in levels]
    axes = Axes(xs, ys, log=log)
    body, data = [axes.frame('epoch')], []
    for line in drawn:
        style, columns = f'style="--c:{line["colour"]}"', line['columns']
        if any(len(column) > 1 for _, column in columns):
            around = [(x, max(c)) for x, c in columns] + [(x, min(c)) for x, c in reversed(columns)]
            body.append(f'<path class="band" {style} d="{axes.line(around)}Z"/>')
        middle = [(x, float(np.mean(c))) for x, c in columns]
        body.append(f'<path class="line" {style} d="{axes.line(middle)}"/>')
        if len(middle) < 12:
            body += [f'<circle {style} cx="{axes.x(x)}" cy="{axes.y(y)}" r="2.4"/>' for x, y in middle]
        data.append([line['name'], line['colour'], [[axes.x(x), axes.y(y), x, number(y)] for x, y in middle]])
    for level in levels:
        y = axes.y(level['value'])
        body.append(f'<path class="line dash" style="--c:{level["colour"]}" d="M{axes.left} {y}H{axes.right}"/>')
    keys = drawn + [level | {'dash': True} for level in levels]
    shown = {'top': axes.top, 'bottom': axes.bottom, 'label': 'epoch', 'lines': data}
    return figure(title, note, ''.join(body), (axes.width, axes.height), shown, key(keys))


def reliability(title, colour, bins, ece, size=(220, 236)):
    """bins: [(how often it was that sure, how sure on average, how often right)]."""
    axes = Axes([0, 1], [0, 1], size=size, whole=True, margin=(34, 8, 8, 34))
    body, most = [axes.frame('how sure', whole_x=False)], max((n for n, *_ in bins), default=1)
    width = (axes.right - axes.left) / max(len(bins), 1)
    for i, (n, sure, right) in enumerate(bins):
        x, told = axes.left + i * width, f'<title>{n} images, {sure:.2f} sure, {right:.2f} right</title>'
        if n:
            top = axes.y(right)
            share = 0.25 + 0.75 * math.sqrt(n / most)
            body.append(f'<rect class="bar" style="--c:{colour};opacity:{share:.2f}" x="{x + 0.8:.1f}" y="{top}" '
                        f'width="{width - 1.6:.1f}" height="{axes.bottom - top:.1f}">{told}</rect>')
    body.append(f'<path class="line dash" style="--c:var(--soft)" d="{axes.line([(0, 0), (1, 1)])}"/>')
    return figure(title, f'ECE {100 * ece:.1f} %', ''.join(body), size)


def stacks(title, rows, parts, unit):
    """rows: [(name, {part: value})]; parts: [(name, colour)]."""
    height, gap, left, width = 18, 9, 118, 880
    size = (width, len(rows) * (height + gap) + 8)
    longest = max((sum(values.values()) for _, values in rows), default=1) or 1
    body = []
    for i, (name, values) in enumerate(rows):
        x, y = left, i * (height + gap) + 4
        body.append(f'<text class="end ink" x="{left - 8}" y="{y + 13}">{escape(name)}</text>')
        for part, colour in parts:
            if value := values.get(part, 0):
                w = value / longest * (width - left - 80)
                told = f'{escape(part)}: {number(value)} {unit}'
                body.append(f'<rect class="bar" style="--c:{colour}" x="{x:.1f}" y="{y}" width="{max(w - 1, 0.5):.1f}" '
                            f'height="{height}"><title>{told}</title></rect>')
                x += w
        body.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{number(sum(values.values()))} {unit}</text>')
    keys = key([{'name': part, 'colour': colour} for part, colour in parts
                if any(values.get(part) for _, values in rows)])
    return figure(title, '', ''.join(body), size, extra=keys)


def matrix(title, note, column, row, shade, unused, sc, tc, size=(300, 300)):
    """A dot per pair [g, sc]: its teacher channel's rank, its student channel's, and a shade 0..4."""
    def place(c, r):
        return f'{6 + c / max(tc - 1, 1) * (size[0] - 12):.1f} {size[1] - 22 - r / max(sc - 1, 1) * (size[1] - 30):.1f}'
    body = []
    if len(column) > 1:
        ends = zip(column.min(0), column.max(0), row)
        body.append('<path class="group" d="' + ''.join(f'M{place(a, r)}L{place(b, r)}' for a, b, r in ends) + '"/>')
    wide = min(max(260 / math.sqrt(column.size) / 3, 1.4), 6)
    for level in range(5):
        dots = ''.join(f'M{place(c, r)}h0' for cs, shades in zip(column, shade)
                       for c, r, s in zip(cs, row, shades) if s == level)
        if dots:
            body.append(f'<path class="dots" style="--c:var(--m{level});stroke-width:{wide:.1f}" d="{dots}"/>')
    if len(unused):
        marks = ''.join(f'M{6 + c / max(tc - 1, 1) * (size[0] - 12):.1f} {size[1] - 14}v6' for c in unused)
        body.append(f'<path class="unused" d="{marks}"/>')
    return figure(title, note, ''.join(body), size)


def missing(title):
    return (f'<figure class="missing"><figcaption><b>{escape(title)}</b></figcaption><p class="quiet">not recorded yet'
            '</p></figure>')
