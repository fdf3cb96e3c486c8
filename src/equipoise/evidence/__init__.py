"""Claims about balancing, each a file with a criterion fixed before its runs, and what the runs say of it.

claim.py      a claim as its file says it                run_summary.py  one run in one line, and which run it is
reproduce.py  trains the runs that are not on record     verdict.py      intervals, tests, confirmed or refuted
text.py       verdicts in a terminal                     power.py        how many seeds a difference needs
page.py       docs/evidence.md                           figure.py       its picture
html_page.py  the same as one HTML file                  html_claim.py   each claim in it
pictures.py   its small pictures                         breakdown.py    behind a difference: steps, domains, noise
diversity.py  how unlike all text a balance batch is     law.py          which law gives the gain of every cell

prediction.py       what a wider scope is worth on a text  prediction_data.py   the text of it
prediction_text.py  its words

downstream.py       exported runs answer questions         downstream_tasks.py  questions from held-out text
harness.py          the door to EleutherAI's lm-eval       downstream_results.py  accuracies and differences
answers_bar.py      progress
"""
