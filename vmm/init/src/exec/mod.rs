//! Exec streams: one connection, one command, one thread. Accepting them and keeping their number bounded is here;
//! [`wire`] moves frames, [`stream`] runs a command.

mod stream;
#[cfg(test)]
mod tests;
mod wire;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blixard_vmm_api::guest::frame::Frame;

use crate::children::Children;
use wire::Wire;

/// Most commands at once.
pub const STREAMS_MAX: usize = 256;
/// A stream's thread keeps its buffers on the heap.
const STACK_BYTES: usize = 256 << 10;

/// Runs the commands of all exec streams.
pub struct Executor {
    children: Arc<Children>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    running: usize,
    closed: bool,
}

/// A place among the [`STREAMS_MAX`]; given back when dropped.
struct Place(Arc<Executor>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
        self.0.changed.notify_all();
    }
}

impl Executor {
    /// An executor whose commands are `children`.
    pub fn new(children: Arc<Children>) -> Arc<Self> {
        Arc::new(Self { children, state: Mutex::default(), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_place(self: &Arc<Self>) -> Result<Place, &'static str> {
        let mut state = self.lock();
        if state.closed {
            return Err("the VM is about to power off");
        }
        if state.running >= STREAMS_MAX {
            return Err("256 commands are running already; try again when one has ended");
        }
        state.running += 1;
        Ok(Place(Arc::clone(self)))
    }

    /// Serves one connection on a thread of its own.
    pub fn serve(self: &Arc<Self>, connection: OwnedFd) {
        let Ok(mut wire) = Wire::new(connection) else { return };
        let refusal = match self.take_place() {
            Ok(place) => {
                let run = move || stream::run(&place.0.children, wire);
                // Without memory for a thread the connection is closed, which its other end understands.
                let _started =
                    std::thread::Builder::new().name("exec".into()).stack_size(STACK_BYTES).spawn(run);
                return;
            }
            Err(reason) => reason,
        };
        wire.send(&Frame::Refused(refusal.into()));
        // There is room for one small frame in a new connection; if not, closing says enough.
        let _sent = wire.flush();
    }

    /// Waits a moment for a stream to end, when there are no descriptors for one more.
    pub fn wait_for_room(&self, limit: Duration) {
        let state = self.lock();
        let _woken = self.changed.wait_timeout(state, limit);
    }

    /// Refuses new commands, and waits until those that run have ended and told so.
    pub fn close(&self, limit: Duration) {
        let mut state = self.lock();
        state.closed = true;
        let _ended = self.changed.wait_timeout_while(state, limit, |state| state.running > 0);
    }
}
