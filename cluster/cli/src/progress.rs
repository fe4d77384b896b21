//! One line on the terminal that says what is being waited for, how far it is and how long it has taken.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::output::{Output, printable};
use crate::units::{show_bytes, show_short};

const TICK: Duration = Duration::from_millis(100);
const WHEEL: [&str; 10] = ["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"];

/// A progress line; it disappears when this is dropped. Without a terminal nothing is shown.
pub struct Progress {
    state: Arc<Mutex<State>>,
    task: Option<tokio::task::JoinHandle<()>>,
}

struct State {
    what: String,
    step: String,
    begin: Instant,
    step_begin: Instant,
    done: Vec<(String, Duration)>,
    /// Bytes so far, and in all.
    bytes: Option<(u64, Option<u64>)>,
}

/// Where bytes of an upload are counted.
#[derive(Clone)]
pub struct Counter(Arc<Mutex<State>>);

impl Progress {
    pub fn start(output: Output, what: &str) -> Self {
        let now = Instant::now();
        let state = State {
            what: printable(what),
            step: String::new(),
            begin: now,
            step_begin: now,
            done: vec![],
            bytes: None,
        };
        let state = Arc::new(Mutex::new(state));
        let shown = state.clone();
        let task = output.progress().then(|| {
            tokio::spawn(async move {
                let mut ticks = tokio::time::interval(TICK);
                for wheel in WHEEL.iter().cycle() {
                    ticks.tick().await;
                    let line = lock(&shown).line();
                    let _ = write!(std::io::stderr().lock(), "\r\x1b[2K{wheel} {line}");
                }
            })
        });
        Self { state, task }
    }

    /// The next step has begun.
    pub fn step(&self, name: &str) {
        let mut state = lock(&self.state);
        if state.step != name {
            let took = state.step_begin.elapsed();
            let before = std::mem::replace(&mut state.step, name.into());
            if !before.is_empty() {
                state.done.push((before, took));
            }
            state.step_begin = Instant::now();
        }
    }

    /// Counts bytes.
    pub fn counter(&self, total: Option<u64>) -> Counter {
        lock(&self.state).bytes = Some((0, total));
        Counter(self.state.clone())
    }

    /// Ends the line with a last word that stays.
    pub fn finish(self, text: &str) {
        let shown = self.task.is_some();
        let (took, steps) = {
            let state = lock(&self.state);
            (state.begin.elapsed(), state.steps())
        };
        drop(self);
        if shown {
            let _ =
                writeln!(std::io::stderr().lock(), "✓ {} in {}{steps}", printable(text), show_short(took));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = write!(std::io::stderr().lock(), "\r\x1b[2K");
        }
    }
}

impl Counter {
    pub fn set(&self, bytes: u64) {
        if let Some((so_far, _)) = &mut lock(&self.0).bytes {
            *so_far = bytes;
        }
    }
}

impl State {
    fn line(&self) -> String {
        let bytes = match self.bytes {
            Some((n, Some(total))) if n < total => format!(" {} of {}", show_bytes(n), show_bytes(total)),
            Some((n, _)) => format!(" {}", show_bytes(n)),
            None => String::new(),
        };
        let step = if self.step.is_empty() {
            String::new()
        } else {
            format!(": {} {}", self.step, show_short(self.step_begin.elapsed()))
        };
        format!("{}{bytes}{step}{}", self.what, self.steps())
    }

    fn steps(&self) -> String {
        let parts: Vec<String> =
            self.done.iter().map(|(name, took)| format!("{name} {}", show_short(*took))).collect();
        if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
