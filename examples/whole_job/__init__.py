"""Parts that the examples of a whole job share: quickstart and smollm2_135m."""
