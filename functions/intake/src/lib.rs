//! Lambda: turns every arriving form of work into validated CloudEvents on the input queue.
