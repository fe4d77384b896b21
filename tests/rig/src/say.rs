//! Messages of the rig itself. They go to standard error: standard output belongs to the command.

use std::error::Error;
use std::fmt::Display;
use std::io::Write;

/// Prints one line with the program's name in front. A closed standard error is no reason to fail.
pub fn say(message: impl Display) {
    _ = writeln!(std::io::stderr(), "blixard-rig: {message}");
}

/// An error with all its causes on one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the box")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_names_every_cause_once() {
        let error = Outer(std::io::Error::other("the lid is stuck"));
        assert_eq!(chain(&error), "cannot open the box: the lid is stuck");
    }
}
