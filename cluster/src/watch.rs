//! A value that is waited for: its receivers see the newest one, not each.
//!
//! As tokio's, but that all who wait are woken in the order in which they began to: tokio puts each of them into one of eight lists by
//! chance, so that two runs of the same simulation would not be the same.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use tokio::sync::Notify;

/// Nobody changes the value any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nobody changes the value any more")]
pub struct Closed;

#[derive(Debug)]
struct Shared<T> {
    value: RwLock<T>,
    /// Grows with each change, while the value is held.
    version: AtomicU64,
    senders: AtomicUsize,
    receivers: AtomicUsize,
    changed: Notify,
}

impl<T> Shared<T> {
    fn read(&self) -> RwLockReadGuard<'_, T> {
        self.value.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn version(&self) -> u64 {
        self.version.load(Ordering::SeqCst)
    }
}

/// Changes the value. Clones change the same one.
#[derive(Debug)]
pub struct Sender<T>(Arc<Shared<T>>);

/// Sees the value, and waits for others. A clone has seen what this one has.
#[derive(Debug)]
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

impl<T> Sender<T> {
    /// A value that nobody waits for yet.
    pub fn new(value: T) -> Self {
        Self(Arc::new(Shared {
            value: RwLock::new(value),
            version: AtomicU64::new(0),
            senders: AtomicUsize::new(1),
            receivers: AtomicUsize::new(0),
            changed: Notify::new(),
        }))
    }

    /// Who waits for values after this one.
    pub fn subscribe(&self) -> Receiver<T> {
        self.0.receivers.fetch_add(1, Ordering::SeqCst);
        Receiver { seen: self.0.version(), shared: Arc::clone(&self.0) }
    }

    /// Whether somebody may wait.
    pub fn has_receivers(&self) -> bool {
        self.0.receivers.load(Ordering::SeqCst) > 0
    }

    /// The value, for a short look.
    pub fn borrow(&self) -> RwLockReadGuard<'_, T> {
        self.0.read()
    }

    /// Changes the value, and wakes all who wait when `change` says that it did.
    pub fn send_if_modified(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let changed = {
            let mut value = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
            let changed = change(&mut value);
            if changed {
                self.0.version.fetch_add(1, Ordering::SeqCst);
            }
            changed
        };
        if changed {
            self.0.changed.notify_waiters();
        }
        changed
    }

    /// Changes the value, and wakes all who wait.
    pub fn send_modify(&self, change: impl FnOnce(&mut T)) {
        self.send_if_modified(|value| {
            change(value);
            true
        });
    }

    /// Puts another value in place of this one, and wakes all who wait.
    pub fn send_replace(&self, value: T) {
        self.send_modify(|present| *present = value);
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.changed.notify_waiters();
        }
    }
}

impl<T> Receiver<T> {
    /// The value, for a short look.
    pub fn borrow(&self) -> RwLockReadGuard<'_, T> {
        self.shared.read()
    }

    /// The same, and waits for later ones from then on.
    pub fn borrow_and_update(&mut self) -> RwLockReadGuard<'_, T> {
        let value = self.shared.read();
        self.seen = self.shared.version();
        value
    }

    /// Waits for values after the present one from then on.
    pub fn mark_unchanged(&mut self) {
        self.seen = self.shared.version();
    }

    /// Waits until there is a value that was not seen yet, and counts it as seen.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn changed(&mut self) -> Result<(), Closed> {
        tokio::task::coop::consume_budget().await;
        loop {
            let notified = self.shared.changed.notified();
            let mut notified = std::pin::pin!(notified);
            // Before looking: what comes in between wakes.
            notified.as_mut().enable();
            let version = self.shared.version();
            if version != self.seen {
                self.seen = version;
                return Ok(());
            }
            if self.shared.senders.load(Ordering::SeqCst) == 0 {
                return Err(Closed);
            }
            notified.await;
        }
    }

    /// Waits until the value is as it shall be.
    ///
    /// # Errors
    /// [`Closed`].
    pub async fn wait_for(&mut self, fits: impl Fn(&T) -> bool) -> Result<(), Closed> {
        loop {
            if fits(&self.borrow_and_update()) {
                return Ok(());
            }
            self.changed().await?;
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        self.shared.receivers.fetch_add(1, Ordering::SeqCst);
        Self { shared: Arc::clone(&self.shared), seen: self.seen }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.receivers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn all_who_wait_are_woken_in_the_order_in_which_they_began() {
        let (sender, order) = (Sender::new(0), Arc::new(Mutex::new(Vec::new())));
        let mut waiting = tokio::task::JoinSet::new();
        for number in 0..32 {
            let (mut receiver, order) = (sender.subscribe(), Arc::clone(&order));
            waiting.spawn(async move {
                receiver.changed().await.unwrap();
                order.lock().unwrap().push(number);
            });
        }
        tokio::task::yield_now().await;
        sender.send_replace(1);
        waiting.join_all().await;
        assert_eq!(*order.lock().unwrap(), (0..32).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn the_newest_value_is_seen_once_and_the_end_after_it() {
        let sender = Sender::new(1);
        let mut receiver = sender.subscribe();
        sender.send_replace(2);
        sender.send_replace(3);
        receiver.changed().await.unwrap();
        assert_eq!(*receiver.borrow(), 3);
        assert!(!sender.send_if_modified(|_| false));
        sender.send_replace(4);
        drop(sender);
        receiver.wait_for(|value| *value == 4).await.unwrap();
        assert_eq!(receiver.changed().await, Err(Closed));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_change_is_missed_by_somebody_on_another_thread() {
        let sender = Sender::new(0_u64);
        let mut receiver = sender.subscribe();
        let waiting = tokio::spawn(async move { receiver.wait_for(|value| *value == 20_000).await });
        for value in 1..=20_000 {
            sender.send_replace(value);
        }
        assert_eq!(waiting.await.unwrap(), Ok(()));
    }
}
