"""The check of signatures, as a decorator: a whole number may stand for a float, as for every other type checker."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
