//! The runtime that openraft runs in: tokio, with random numbers that can be determined. openraft draws the times of its elections
//! by [`AsyncRuntime::thread_rng`]; they are the only chance in it. In a simulation they follow from a seed.

use std::cell::Cell;
use std::future::Future;
use std::time::Duration;

use openraft::impls::TokioRuntime as Tokio;
use openraft::{AsyncRuntime, OptionalSend};
use rand::SeedableRng;
use rand::rngs::SmallRng;

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

/// Tokio, but for [`AsyncRuntime::thread_rng`].
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
    type Watch = <Tokio as AsyncRuntime>::Watch;
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
