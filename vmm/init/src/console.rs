//! Lines of init itself on the guest's console.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

/// Writes one line to the console. Without a console it is lost; a console that is held (Ctrl-S) does not stop init,
/// because the line is written without blocking.
pub fn line(text: &str) {
    let console = std::fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open("/dev/console");
    if let Ok(mut console) = console {
        // Nobody is left to tell when the console itself fails.
        let _lost = console.write_all(format!("blixard-init: {text}\n").as_bytes());
    }
}

/// An error and its causes as one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
