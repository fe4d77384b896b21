//! Holds vCPU threads, or lets them run, and asks held ones for their state.
//!
//! ```text
//!   thread:  loop { clear the kick; held? ─ yes ─► park ──► again        I/O thread:  hold; kick each thread; wait until
//!                                         └ no ──► run until kicked }                 all are parked
//! ```
//!
//! A kick that comes before the thread runs must end the run as well, so it is cleared before `held?` is asked, never after it.
//! `loom_test.rs` tries all orders.

use std::sync::PoisonError;

use crate::sync::{Arc, AtomicBool, Condvar, Mutex, MutexGuard, Ordering};

/// What is known of the threads. `Q` is what is needed to read a state, `S` a state.
struct Parked<Q, S> {
    hold: bool,
    waiting: usize,
    /// Threads that have ended.
    ended: usize,
    /// How often states were asked for.
    number: u64,
    question: Option<Arc<Q>>,
    answers: Vec<(u8, S)>,
}

/// Holds all vCPUs, or lets them run. At the beginning they are held. Held threads read their state when they are asked.
pub struct Gate<Q, S> {
    /// Copy of `Parked::hold` that is cheap to look at.
    hold: AtomicBool,
    parked: Mutex<Parked<Q, S>>,
    changed: Condvar,
}

impl<Q, S> Gate<Q, S> {
    /// A closed gate.
    pub fn new() -> Self {
        let parked = Parked { hold: true, waiting: 0, ended: 0, number: 0, question: None, answers: vec![] };
        Self { hold: AtomicBool::new(true), parked: Mutex::new(parked), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Parked<Q, S>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, parked: MutexGuard<'a, Parked<Q, S>>) -> MutexGuard<'a, Parked<Q, S>> {
        self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes or opens the gate. Threads notice it when they look, so who closes it has to kick them.
    pub fn set(&self, hold: bool) {
        let mut parked = self.lock();
        parked.hold = hold;
        self.hold.store(hold, Ordering::SeqCst);
        drop(parked);
        self.changed.notify_all();
    }

    /// Whether it is closed.
    pub fn is_held(&self) -> bool {
        self.hold.load(Ordering::SeqCst)
    }

    /// What thread `index` does while the gate is closed; `save` reads its state.
    pub fn park(&self, index: u8, save: &dyn Fn(&Q) -> S) {
        let mut parked = self.lock();
        let mut answered = parked.number;
        parked.waiting += 1;
        self.changed.notify_all();
        while parked.hold {
            match &parked.question {
                Some(question) if parked.number != answered => {
                    answered = parked.number;
                    let question = question.clone();
                    drop(parked);
                    let state = save(&question);
                    parked = self.lock();
                    parked.answers.push((index, state));
                    self.changed.notify_all();
                }
                _ => parked = self.wait(parked),
            }
        }
        parked.waiting -= 1;
    }

    /// Waits until `count` threads are parked or have ended.
    pub fn wait_for(&self, count: usize) {
        let mut parked = self.lock();
        while parked.waiting < count {
            parked = self.wait(parked);
        }
    }

    /// The states of `count` parked threads, by index; nothing when one has ended.
    pub fn save(&self, count: usize, question: Q) -> Option<Vec<S>> {
        let mut parked = self.lock();
        parked.answers.clear();
        parked.number += 1;
        parked.question = Some(Arc::new(question));
        self.changed.notify_all();
        while parked.answers.len() + parked.ended < count {
            parked = self.wait(parked);
        }
        if parked.ended > 0 {
            return None;
        }
        let mut answers = std::mem::take(&mut parked.answers);
        drop(parked);
        answers.sort_by_key(|(index, _)| *index);
        Some(answers.into_iter().map(|(_, state)| state).collect())
    }

    /// The thread has ended: it counts as parked from now on.
    pub fn end(&self) {
        let mut parked = self.lock();
        parked.waiting += 1;
        parked.ended += 1;
        self.changed.notify_all();
    }
}

impl<Q, S> Default for Gate<Q, S> {
    fn default() -> Self {
        Self::new()
    }
}
