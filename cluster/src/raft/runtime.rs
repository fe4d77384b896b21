//! The runtime that openraft runs in: tokio, but for what happens by chance. openraft draws the times of its elections by
//! [`AsyncRuntime::thread_rng`]; in a simulation they follow from a seed. Who waits for a value is woken in order ([`watch`]).

use std::cell::Cell;
use std::future::Future;
use std::sync::RwLockReadGuard;
use std::time::Duration;

use openraft::async_runtime::watch::{RecvError, SendError, Watch, WatchReceiver, WatchSender};
use openraft::impls::TokioRuntime as Tokio;
use openraft::{AsyncRuntime, OptionalSend, OptionalSync};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::watch;

thread_local! {
    /// The seed of the next generator, where all are determined.
    static NEXT_SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From now on the random numbers of openraft in this thread follow from `seed`. With a runtime of one thread, and nothing
/// else by chance, two runs of a program are then the same.
pub fn determine(seed: u64) {
    NEXT_SEED.set(Some(seed));
}

fn generator() -> SmallRng {
    match NEXT_SEED.get() {
        Some(seed) => {
            NEXT_SEED.set(Some(seed.wrapping_add(1)));
            SmallRng::seed_from_u64(seed)
        }
        None => SmallRng::from_rng(&mut rand::rng()),
    }
}

/// [`watch`] in the words of openraft.
#[derive(Debug)]
pub struct Watched;

impl Watch for Watched {
    type Sender<T: OptionalSend + OptionalSync> = watch::Sender<T>;
    type Receiver<T: OptionalSend + OptionalSync> = watch::Receiver<T>;
    type Ref<'a, T: OptionalSend + 'a> = RwLockReadGuard<'a, T>;

    fn channel<T: OptionalSend + OptionalSync>(init: T) -> (watch::Sender<T>, watch::Receiver<T>) {
        let sender = watch::Sender::new(init);
        let receiver = sender.subscribe();
        (sender, receiver)
    }
}

impl<T: OptionalSend + OptionalSync> WatchSender<Watched, T> for watch::Sender<T> {
    fn send(&self, value: T) -> Result<(), SendError<T>> {
        if !self.has_receivers() {
            return Err(SendError(value));
        }
        self.send_replace(value);
        Ok(())
    }

    fn send_if_modified<F>(&self, modify: F) -> bool
    where
        F: FnOnce(&mut T) -> bool,
    {
        self.send_if_modified(modify)
    }

    fn borrow_watched(&self) -> RwLockReadGuard<'_, T> {
        self.borrow()
    }

    fn subscribe(&self) -> watch::Receiver<T> {
        self.subscribe()
    }
}

impl<T: OptionalSend + OptionalSync> WatchReceiver<Watched, T> for watch::Receiver<T> {
    async fn changed(&mut self) -> Result<(), RecvError> {
        self.changed().await.map_err(|_| RecvError(()))
    }

    fn borrow_watched(&self) -> RwLockReadGuard<'_, T> {
        self.borrow()
    }

    fn borrow_and_update(&mut self) -> RwLockReadGuard<'_, T> {
        self.borrow_and_update()
    }
}

/// Tokio, but for watches and [`AsyncRuntime::thread_rng`].
#[derive(Debug)]
pub struct Runtime(Tokio);

impl AsyncRuntime for Runtime {
    type JoinError = <Tokio as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <Tokio as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <Tokio as AsyncRuntime>::Sleep;
    type Instant = <Tokio as AsyncRuntime>::Instant;
    type TimeoutError = <Tokio as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <Tokio as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = SmallRng;
    type Mpsc = <Tokio as AsyncRuntime>::Mpsc;
    type Watch = Watched;
    type Oneshot = <Tokio as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <Tokio as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        Tokio::spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        Tokio::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        Tokio::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(
        duration: Duration,
        future: F,
    ) -> Self::Timeout<R, F> {
        Tokio::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        Tokio::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        Tokio::is_panic(join_error)
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        generator()
    }

    fn new(threads: usize) -> Self {
        Self(Tokio::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    #[test]
    fn numbers_follow_from_the_seed_once_there_is_one() {
        let draw = || (0..4).map(|_| Runtime::thread_rng().random_range(0..u64::MAX)).collect::<Vec<_>>();
        let by_chance = std::thread::spawn(move || draw() == draw()).join().unwrap();
        assert!(!by_chance);
        let determined = |seed| {
            determine(seed);
            draw()
        };
        assert_eq!(determined(7), determined(7));
        assert_ne!(determined(7), determined(1 << 40));
    }
}
