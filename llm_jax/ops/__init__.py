"""Operations on arrays: what a layer computes, with no parameters of its own."""
