//! The terminal of the user: raw mode while it belongs to a guest, its size, the keys that detach.

use std::io::{self, IsTerminal};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::error::CliError;

/// Raw mode of standard input; the terminal is as before when this is dropped.
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Switches the terminal of standard input to raw mode: every key goes to the guest.
    pub fn enter() -> Result<Self, CliError> {
        if !io::stdin().is_terminal() {
            return Err(CliError::Usage {
                message: "standard input is no terminal".into(),
                suggestion: "leave out -t (with -i standard input still reaches the command)".into(),
            });
        }
        let wrong = |e: nix::Error| CliError::local("cannot switch the terminal to raw mode", e.into());
        let before = tcgetattr(io::stdin()).map_err(wrong)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw).map_err(wrong)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing is left to try when the terminal has gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}

/// Columns and rows of the terminal; 80 × 24 when it does not say.
pub fn size() -> (u16, u16) {
    terminal_size::terminal_size_of(io::stdin()).map_or((80, 24), |(width, height)| (width.0, height.0))
}

/// Looks for ctrl-p ctrl-q in what is typed.
#[derive(Debug, Default)]
pub struct DetachKeys {
    /// A ctrl-p is held back until the next key.
    pending: bool,
}

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

impl DetachKeys {
    /// The bytes that go on to the guest, and whether the user detached after them.
    pub fn feed(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut pass = Vec::with_capacity(typed.len() + 1);
        for byte in typed {
            match (self.pending, *byte) {
                (true, CTRL_Q) => return (pass, true),
                (true, CTRL_P) => pass.push(CTRL_P),
                (true, other) => {
                    pass.extend([CTRL_P, other]);
                    self.pending = false;
                }
                (false, CTRL_P) => self.pending = true,
                (false, other) => pass.push(other),
            }
        }
        (pass, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detach_keys_are_found_across_reads_and_everything_else_passes() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.feed(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(keys.feed(&[CTRL_P]), (vec![], false));
        assert_eq!(keys.feed(b"x"), (vec![CTRL_P, b'x'], false));
        assert_eq!(keys.feed(&[CTRL_P, CTRL_P]), (vec![CTRL_P], false));
        assert_eq!(keys.feed(&[CTRL_Q, b'z']), (vec![], true));
    }

    #[test]
    fn without_a_terminal_raw_mode_says_what_to_leave_out() {
        if !io::stdin().is_terminal() {
            let error = RawMode::enter().err().unwrap();
            assert!(error.to_text().contains("leave out -t"));
        }
    }
}
