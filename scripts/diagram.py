"Draw the diagram of the method, nbs/images/method.svg: boxes, arrows and the notebook that explains each step."
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1]/"nbs/images/method.svg"
WIDTH, HEIGHT = 1080, 414
INK, GREY = "#222222", "#6b6b6b"
TEXT, IMAGE, LEARN = ("#FDF1D8", "#E69F00"), ("#DDEEF8", "#0072B2"), ("#DDF2EA", "#009E73")      # fill and frame


def box(x, y, w, title, detail, notebook, colours, h=66):
    "A step: its name, what it does, the notebook that explains it."
    fill, frame = colours
    middle = x + w/2
    return (f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{fill}" stroke="{frame}" stroke-width="1.6"/>'
            + label(middle, y + 22, title, 15, INK, "bold") + label(middle, y + 40, detail, 12, INK)
            + label(middle, y + 57, notebook, 11, GREY))


def label(x, y, text, size=13, colour=INK, weight="normal", anchor="middle", style="normal"):
    "A line of text."
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" font-style="{style}" '
            f'text-anchor="{anchor}">{text}</text>')


def arrow(*points, name="", at=None, dashed=False, colour=INK):
    "A line through points that ends in an arrowhead, and the name of what travels along it."
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash} marker-end="url(#head)"/>'
    return line + (label(*at, name, 14, colour, "bold", style="italic") if name else "")


def picture(x, y):
    "A ball on snow at dusk."
    return (f'<g transform="translate({x},{y})"><rect width="96" height="96" fill="#f2b27a"/>'
            '<rect width="96" height="34" fill="#8d6a8f"/><rect y="52" width="96" height="44" fill="#dfe6ee"/>'
            '<ellipse cx="46" cy="80" rx="27" ry="6" fill="#aab4c0"/><circle cx="44" cy="56" r="24" fill="#b3261e"/>'
            '<circle cx="37" cy="48" r="8" fill="#d9635c"/><rect width="96" height="96" fill="none" stroke="#555"/></g>')


def canvas(x, y):
    "The same picture's patches in another order."
    colours = ["#dfe6ee", "#8d6a8f", "#b3261e", "#f2b27a", "#cfd8e2", "#b3261e", "#f2b27a", "#dfe6ee",
               "#8d6a8f", "#f2b27a", "#aab4c0", "#b3261e", "#f2b27a", "#dfe6ee", "#8d6a8f", "#d9635c"]
    squares = "".join(f'<rect x="{14*(i % 4)}" y="{14*(i//4)}" width="13" height="13" fill="{c}"/>' for i, c in enumerate(colours))
    return f'<g transform="translate({x},{y})">{squares}</g>'


def draw():
    "The whole diagram as SVG."
    parts = [
        label(64, 178, "a picture", 14, INK, "bold"), picture(16, 188), label(64, 302, "photograph or", 12, GREY),
        label(64, 318, "generated?", 12, GREY),
        # what it shows
        label(150, 38, "what it shows", 14, TEXT[1], "bold", "start"),
        box(150, 52, 150, "BLIP", "says what is shown", "09_captions", TEXT),
        box(440, 52, 150, "CLIP text tower", "frozen", "11_clip", TEXT),
        box(640, 52, 150, "Semantic Mapper", "M(v), eq. 14", "15_model", LEARN),
        arrow((64, 168), (64, 85), (148, 85)), arrow((300, 85), (438, 85)),
        label(369, 66, "“a red ball on", 12, INK, style="italic"), label(369, 79, "snow at dusk”", 12, INK, style="italic"),
        arrow((590, 85), (638, 85), name="v", at=(613, 77)),
        # how it was made
        label(150, 306, "what it shows and how it was made", 14, IMAGE[1], "bold", "start"),
        box(150, 318, 150, "patch selection", "spectral entropy, eq. 13", "10_patches", IMAGE),
        canvas(342, 324), label(370, 396, "canvas", 12, GREY),
        box(440, 318, 150, "CLIP image tower", "with LoRA", "11_clip, 12_lora", IMAGE),
        arrow((64, 326), (64, 351), (148, 351)), arrow((300, 351), (338, 351)), arrow((400, 351), (438, 351)),
        # the projection
        box(605, 190, 220, "null-space projection", "ũ = u − (u·m) m / ‖m‖², eq. 16", "13_nullspace", LEARN, 70),
        arrow((715, 118), (715, 188), name="m", at=(731, 160)), arrow((590, 351), (715, 351), (715, 262), name="u", at=(652, 343)),
        # the decision
        box(860, 192, 90, "head", "f, eq. 17", "15_model", LEARN), arrow((825, 225), (858, 225), name="ũ", at=(840, 216)),
        box(980, 192, 88, "logit", "p(generated)", "19_inference", LEARN), arrow((950, 225), (978, 225), name="f", at=(963, 216)),
        # the losses
        label(1024, 38, "three losses", 14, GREY, "bold"), label(1024, 56, "14_losses, 23_training", 11, GREY),
        arrow((790, 85), (846, 85), dashed=True, colour=GREY), label(850, 81, "alignment: m near u", 12, GREY, anchor="start"),
        label(850, 96, "β, eq. 20", 12, GREY, anchor="start"),
        arrow((905, 258), (905, 306), dashed=True, colour=GREY), label(905, 322, "contrastive", 12, GREY), label(905, 337, "eq. 18", 12, GREY),
        arrow((1024, 258), (1024, 306), dashed=True, colour=GREY), label(1024, 322, "cross-entropy", 12, GREY),
        label(1024, 337, "α, eq. 19", 12, GREY),
    ]
    head = ('<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
            f'<path d="M0,0 L10,5 L0,10 z" fill="{INK}"/></marker></defs>')
    title = "<title>Advanced NS-Net: the caption's direction is projected out of the image's embedding</title>"
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'font-family="Helvetica, Arial, sans-serif">\n{title}\n{head}\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n')


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else TARGET
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(draw(), encoding="utf-8")
