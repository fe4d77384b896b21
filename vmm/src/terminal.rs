//! The terminal of the developer front end: what is typed goes to the guest at once and is not shown twice.

use std::mem::MaybeUninit;

/// A terminal without line editing and echo; its settings come back when this is dropped.
pub struct Raw(libc::termios);

impl Raw {
    /// Switches standard input, when `wanted` and when it is a terminal. Interrupt keys still reach the VMM.
    pub fn enter(wanted: bool) -> Option<Self> {
        if !wanted {
            return None;
        }
        let mut settings = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the pointer is to memory of the right size.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) } != 0 {
            return None;
        }
        // SAFETY: the call succeeded and filled the structure.
        let before = unsafe { settings.assume_init() };
        let mut raw = before;
        raw.c_lflag &= !(libc::ICANON | libc::ECHO);
        raw.c_iflag &= !libc::ICRNL;
        set(&raw).then_some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        set(&self.0);
    }
}

fn set(settings: &libc::termios) -> bool {
    // SAFETY: the pointer is to a filled structure.
    unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, std::ptr::from_ref(settings)) == 0 }
}
