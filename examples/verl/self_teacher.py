"""What every process of verl imports: ``VERL_USE_EXTERNAL_MODULES=self_teacher``."""

from fastsdpo.integrations.verl_self_teacher import use_self_teacher

use_self_teacher("full", alpha=0.5)  # Jensen-Shannon; ("topk", topk=100, alpha=0.0), ("sampled_token"), ...
