//! What happened, in order: kept as one number, so that two runs can be compared, and as text when somebody wants to read it. The
//! first thing that is wrong ends the run.

use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

#[derive(Debug)]
struct Events {
    begin: Instant,
    count: u64,
    /// FNV-1a of all events with their times.
    hash: u64,
    print: bool,
    wrong: Option<String>,
}

/// The events of one run. Clones note the same run.
#[derive(Debug, Clone)]
pub struct Trace(Arc<Mutex<Events>>);

impl Trace {
    /// Nothing has happened yet.
    pub fn new(print: bool) -> Self {
        let begin = Instant::now();
        Self(Arc::new(Mutex::new(Events {
            begin,
            count: 0,
            hash: 0xcbf2_9ce4_8422_2325,
            print,
            wrong: None,
        })))
    }

    fn events(&self) -> MutexGuard<'_, Events> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This happened now.
    #[expect(clippy::print_stderr, reason = "a trace is asked for by somebody at a terminal")]
    pub fn note(&self, what: impl Display) {
        let mut events = self.events();
        let at_us = events.begin.elapsed().as_micros();
        let line = format!("{:>8}.{:03} {what}", at_us / 1000, at_us % 1000);
        for byte in line.bytes() {
            events.hash = (events.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        events.count += 1;
        if events.print {
            eprintln!("{line}");
        }
    }

    /// This must not be. The first one counts.
    pub fn wrong(&self, what: impl Display) {
        self.note(format_args!("WRONG {what}"));
        let mut events = self.events();
        if events.wrong.is_none() {
            events.wrong = Some(what.to_string());
        }
    }

    /// The first thing that was wrong.
    pub fn found(&self) -> Option<String> {
        self.events().wrong.clone()
    }

    /// How many events there were, and the number that they make together.
    pub fn sum(&self) -> (u64, u64) {
        let events = self.events();
        (events.count, events.hash)
    }
}
