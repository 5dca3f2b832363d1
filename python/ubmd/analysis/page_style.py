"""The look of the HTML pages: colours of both schemes, widths, tables, pictures, print.

Pictures are drawn for a white ground. In the dark scheme their lightness is turned round and their hues are kept (a
blue line stays blue), and the ground, then black, takes the colour of the page: there is one picture for both schemes.
"""

from __future__ import annotations

COLOURS = """
:root { color-scheme: light dark; --ground: #fff; --text: #1a1a1a; --soft: #545454; --line: #d4d4d4; --rule: #8c8c8c;
        --link: #0b57a4; --shade: rgba(0, 0, 0, 0.28); --mark: #eef3f8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ground: #16181c; --text: #e6e6e6; --soft: #b0b5bd; --line: #3b4048; --rule: #7c828c;
          --link: #86bdf5; --shade: rgba(255, 255, 255, 0.32); --mark: #20262e; }
}
"""
"""Colours of the light and the dark scheme, as variables; paper is light."""

STYLE = (
    COLOURS
    + """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--text);
       background: var(--ground); margin: 0 auto; padding: 1.2rem 1.2rem 3rem; max-width: 112rem; }
a { color: var(--link); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; padding-bottom: 0.15rem; border-bottom: 1px solid var(--line); }
p { max-width: 75ch; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 0.6rem 0; color: var(--link); }

/* Contents: a strip that stays at the top of narrow windows, a column beside the text in wide ones. */
nav { position: sticky; top: 0; z-index: 1; display: flex; overflow-x: auto; margin: 0 -1.2rem; padding: 0 1.2rem;
      border-bottom: 1px solid var(--line); background: var(--ground); font-size: 0.9rem; scrollbar-width: thin; }
nav a { flex: none; padding: 0.45rem 0.6rem; text-decoration: none; }
nav a:hover, nav a:focus { text-decoration: underline; background: var(--mark); }
section { scroll-margin-top: 3rem; }
@media screen and (min-width: 68rem) {
  .columns { display: grid; grid-template-columns: 12.5rem minmax(0, 1fr); column-gap: 1.6rem; }
  nav { flex-direction: column; align-self: start; max-height: 100vh; overflow: auto; margin: 0; padding: 1rem 0;
        border: 0; }
  nav a { padding: 0.25rem 0.5rem; border-left: 2px solid var(--line); }
  section { scroll-margin-top: 0.5rem; }
  section:first-child h2 { margin-top: 1rem; }
}

/* A table that is wider than the window scrolls in its box, and so does a picture before its letters become too small
   to be read: a shade marks the side on which there is more. */
.wide, .picture { overflow-x: auto; scrollbar-width: thin; background:
  linear-gradient(to right, var(--ground) 40%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--ground) 40%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / 0.9rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / 0.9rem 100% no-repeat scroll; }
.wide { margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
         min-width: 2.8rem; max-width: 75ch; }
.unit { white-space: nowrap; }
th { vertical-align: bottom; border-bottom: 2px solid var(--rule); }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
td.long { min-width: 14rem; overflow-wrap: anywhere; }

/* Pictures beside each other where the window has room for two that can be read. */
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 38rem), 1fr)); gap: 1rem 1.5rem;
            margin: 0.8rem 0; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; mix-blend-mode: multiply; }
figcaption { font-size: 0.9rem; color: var(--soft); max-width: 75ch; margin-top: 0.3rem; }
@media screen and (prefers-color-scheme: dark) { img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }

@media print {
  nav { display: none; }
  body { padding: 0; max-width: none; font-size: 11pt; }
  .wide, .picture { overflow: visible; background: none; }
  table { font-size: 8.5pt; width: 100%; }
  th, td { padding: 0.15rem 0.3rem; min-width: 0; }
  td.long { min-width: 0; }
  thead { display: table-header-group; }
  tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
  .pictures { display: block; }
  img { min-width: 0 !important; }
}
"""
)
