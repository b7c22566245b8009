//! Lambda: decides how many tasks and instances the backlog needs, and acts on it.
