"""The lab: a small real trainer that compares balancing strategies on real text. Needs the extra ``equipoise[lab]``."""
