"""verl wants a reward of every answer; training towards a self-teacher has none."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0
