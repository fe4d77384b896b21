//! The flight recorder: the last events of this process and its VM, for whoever asks afterwards why it ended.
//!
//! One per process, as there is one VM per process, so that also a panic finds it. Only what is rare is noted here: phases,
//! activations, resets and failures of devices, requests, exits that end the guest. Its memory is fixed, and nothing of it is
//! touched before the first event.

use std::sync::{Mutex, PoisonError};

use blixard_vmm_api::control::Request;
use blixard_vmm_api::stats::{EVENTS_MAX, FlightEvent};

use crate::times::now_us;

/// What something happened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// The VM as a whole.
    Vm,
    /// A vCPU.
    Vcpu(u8),
    /// A device, by its place on the bus.
    Device(u8),
    /// Somebody asked over the control socket.
    Control,
}

impl What {
    /// The device at place `index`.
    pub fn device(index: usize) -> Self {
        Self::Device(u8::try_from(index).unwrap_or(u8::MAX))
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    at_us: u64,
    what: What,
    event: &'static str,
}

/// A ring of events.
#[derive(Debug)]
pub struct Recorder {
    entries: [Entry; EVENTS_MAX],
    /// Events so far; the newest is at the place before it.
    count: usize,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new()
    }
}

impl Recorder {
    /// No events.
    pub const fn new() -> Self {
        Self { entries: [Entry { at_us: 0, what: What::Vm, event: "" }; EVENTS_MAX], count: 0 }
    }

    fn note(&mut self, at_us: u64, what: What, event: &'static str) {
        if let Some(entry) = self.entries.get_mut(self.count % EVENTS_MAX) {
            *entry = Entry { at_us, what, event };
        }
        self.count = self.count.wrapping_add(1);
    }

    /// The events that it still has, oldest first. `name` is asked for the names of devices.
    pub fn events(&self, name: &dyn Fn(u8) -> Option<String>) -> Vec<FlightEvent> {
        let first = self.count.saturating_sub(EVENTS_MAX);
        (first..self.count)
            .filter_map(|number| self.entries.get(number % EVENTS_MAX))
            .map(|entry| FlightEvent {
                at_us: entry.at_us,
                what: match entry.what {
                    What::Vm => "vm".to_owned(),
                    What::Vcpu(index) => format!("vcpu{index}"),
                    What::Device(index) => name(index).unwrap_or_else(|| format!("device{index}")),
                    What::Control => "control".to_owned(),
                },
                event: entry.event.to_owned(),
            })
            .collect()
    }
}

static RECORDER: Mutex<Recorder> = Mutex::new(Recorder::new());

/// Notes an event of now.
pub fn note(what: What, event: &'static str) {
    RECORDER.lock().unwrap_or_else(PoisonError::into_inner).note(now_us(), what, event);
}

/// Notes a request.
pub fn note_request(request: &Request) {
    let event = match request {
        Request::Pause => "pause",
        Request::Resume => "resume",
        Request::Stop => "stop",
        Request::Kill => "kill",
        Request::Subscribe => "subscribe",
        Request::Snapshot(_) => "snapshot",
        Request::Fork => "fork",
        Request::WorkingSet => "working set",
        Request::ResizeDisk { .. } => "resize disk",
        Request::SwapDisk { .. } => "swap disk",
        Request::SetBalloon { .. } => "set balloon",
        Request::StartHinting | Request::StopHinting => "hinting",
        // Asked all the time, and changes nothing.
        Request::Status | Request::Stats | Request::Metrics { .. } => return,
    };
    note(What::Control, event);
}

/// All events that are left; see [`Recorder::events`].
pub fn events(name: &dyn Fn(u8) -> Option<String>) -> Vec<FlightEvent> {
    RECORDER.lock().unwrap_or_else(PoisonError::into_inner).events(name)
}

/// As [`events`], for a process that panics: nothing when another thread is in the middle of a note.
pub fn events_now() -> Vec<FlightEvent> {
    RECORDER.try_lock().map(|recorder| recorder.events(&|_| None)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_events_are_kept_in_order() {
        let mut recorder = Recorder::new();
        let name = |index| (index == 1).then(|| "net.nic0".to_owned());
        assert_eq!(recorder.events(&name), []);
        for at in 0..300 {
            recorder.note(at, What::Device(u8::try_from(at % 2).unwrap()), "activated");
        }
        recorder.note(300, What::Vcpu(3), "triple fault");
        let events = recorder.events(&name);
        assert_eq!(events.len(), EVENTS_MAX);
        assert!(events.iter().map(|e| e.at_us).eq(301 - EVENTS_MAX as u64..301));
        let texts: Vec<_> =
            events.iter().rev().take(3).map(|e| (e.what.as_str(), e.event.as_str())).collect();
        assert_eq!(texts, [("vcpu3", "triple fault"), ("net.nic0", "activated"), ("device0", "activated")]);
    }

    #[test]
    fn a_full_recorder_fits_in_an_exit_record() {
        let mut recorder = Recorder::new();
        for _ in 0..EVENTS_MAX {
            recorder.note(u64::MAX, What::Device(0), "the driver's queues are refused");
        }
        let events = recorder.events(&|_| Some("blk.01234567890123456789".into()));
        assert!(serde_json::to_vec(&events).unwrap().len() < 32 << 10);
    }
}
