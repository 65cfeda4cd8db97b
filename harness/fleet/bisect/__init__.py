"""Which release of a package changed a case: releases from the index, an environment for each, a search by the gate's rule."""
