//! All orders of what threads do at the two places where a lost wake-up would hang a VM: messages to the I/O thread, and the
//! pause of vCPUs. Run by `make loom`.

use loom::model::Builder;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use crate::gate::Gate;
use crate::mailbox::{Mailbox, Message, Wake};

/// What is set until it is cleared, and can be waited for: an eventfd under epoll; or the field that a signal handler sets to end
/// the run of a vCPU.
#[derive(Debug, Default)]
struct Event {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    fn set(&self) {
        *self.set.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn clear(&self) {
        *self.set.lock().unwrap() = false;
    }

    fn wait(&self) {
        let mut set = self.set.lock().unwrap();
        while !*set {
            set = self.changed.wait(set).unwrap();
        }
    }
}

impl Wake for Event {
    fn wake(&self) {
        self.set();
    }

    fn clear(&self) {
        Event::clear(self);
    }
}

fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn every_message_is_taken_whatever_comes_between() {
    check(4, || {
        let mailbox = Arc::new(Mailbox::with(Event::default()));
        let posters: Vec<_> = (0..2)
            .map(|thread| {
                let mailbox = mailbox.clone();
                thread::spawn(move || {
                    mailbox.post(Message::Activate(thread));
                    mailbox.post(Message::Reset(thread));
                })
            })
            .collect();
        let mut taken = vec![];
        // A message that nobody is woken for is a thread that waits for ever, which loom reports.
        while taken.len() < 4 {
            mailbox.waker().wait();
            taken.extend(mailbox.take());
        }
        for index in 0..2 {
            let own = |m: &&Message| matches!(m, Message::Activate(n) | Message::Reset(n) if *n == index);
            let order: Vec<_> = taken.iter().filter(own).cloned().collect();
            assert_eq!(order, [Message::Activate(index), Message::Reset(index)]);
        }
        posters.into_iter().for_each(|poster| poster.join().unwrap());
    });
}

/// A vCPU thread: what [`crate::vcpu`] does, with a guest that runs until it is kicked.
struct Vcpu {
    index: u8,
    gate: Arc<Gate<(), u8>>,
    kick: Arc<Event>,
    in_guest: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
}

impl Vcpu {
    fn run(self) {
        let save = |(): &()| self.index;
        self.gate.park(self.index, &save);
        loop {
            self.kick.clear();
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            if self.gate.is_held() {
                self.gate.park(self.index, &save);
                continue;
            }
            self.in_guest.fetch_add(1, Ordering::SeqCst);
            self.kick.wait();
            self.in_guest.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn vcpus(count: u8, preemptions: usize, pauses: usize) {
    check(preemptions, move || {
        let gate = Arc::new(Gate::new());
        let (in_guest, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let kicks: Vec<Arc<Event>> = (0..count).map(|_| Arc::default()).collect();
        let threads: Vec<_> = (0..count)
            .zip(&kicks)
            .map(|(index, kick)| {
                let (gate, kick) = (gate.clone(), kick.clone());
                let vcpu = Vcpu { index, gate, kick, in_guest: in_guest.clone(), over: over.clone() };
                thread::spawn(move || vcpu.run())
            })
            .collect();
        for _ in 0..pauses {
            gate.set(false);
            // A pause, as `Vcpus::pause` does it.
            gate.set(true);
            kicks.iter().for_each(|kick| kick.set());
            gate.wait_for(count.into());
            assert_eq!(in_guest.load(Ordering::SeqCst), 0, "a paused guest runs");
            assert_eq!(gate.save(count.into(), ()), Some((0..count).collect()));
            assert_eq!(in_guest.load(Ordering::SeqCst), 0, "a paused guest runs");
        }
        over.store(true, Ordering::SeqCst);
        gate.set(false);
        kicks.iter().for_each(|kick| kick.set());
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_pause_stops_a_vcpu_wherever_it_is() {
    vcpus(1, 4, 2);
}

#[test]
fn a_pause_stops_all_vcpus_and_each_tells_its_state_once() {
    vcpus(2, 2, 1);
}

#[test]
fn a_pause_does_not_wait_for_a_vcpu_that_ends() {
    check(4, || {
        let gate = Arc::new(Gate::<(), u8>::new());
        let thread = {
            let gate = gate.clone();
            thread::spawn(move || {
                gate.park(0, &|()| 0);
                gate.end();
            })
        };
        gate.set(false);
        gate.set(true);
        gate.wait_for(1);
        // It has ended, or did not see that it was let go.
        assert!(matches!(gate.save(1, ()).as_deref(), None | Some([0])));
        gate.set(false);
        thread.join().unwrap();
    });
}
