//! Counting: histograms owned by one thread, and the list in which everything that is counted is handed out.

use blixard_vmm_api::stats::{self, BUCKETS_MAX, Sample, Value};

/// How values are spread, with a bucket per power of two; see [`stats::Histogram`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    sum: u64,
    buckets: [u64; BUCKETS_MAX],
}

/// The bucket that `value` belongs to.
pub fn bucket(value: u64) -> usize {
    let bits = u64::BITS - value.leading_zeros();
    usize::try_from(bits).unwrap_or(0).min(BUCKETS_MAX - 1)
}

impl Histogram {
    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.sum = self.sum.saturating_add(value);
        if let Some(count) = self.buckets.get_mut(bucket(value)) {
            *count += 1;
        }
    }

    /// What was counted so far.
    pub fn read(&self) -> stats::Histogram {
        read(self.sum, &self.buckets)
    }
}

/// A histogram as it is handed out.
pub fn read(sum: u64, buckets: &[u64]) -> stats::Histogram {
    let used = buckets.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
    stats::Histogram { sum, buckets: buckets.get(..used).unwrap_or_default().to_vec() }
}

/// Samples of all devices, in the order in which they are asked.
#[derive(Debug, Default)]
pub struct Samples {
    device: String,
    list: Vec<Sample>,
}

impl Samples {
    /// What follows is this device's.
    pub fn of(&mut self, device: &str) -> &mut Self {
        device.clone_into(&mut self.device);
        self
    }

    /// Adds counters of the device, or of one of its queues.
    pub fn counters(&mut self, queue: Option<u16>, counters: &[(&str, u64)]) {
        for (name, count) in counters {
            self.add(queue, name, Value::Count(*count));
        }
    }

    /// Adds a histogram.
    pub fn histogram(&mut self, queue: Option<u16>, name: &str, histogram: &Histogram) {
        self.spread(queue, name, histogram.read());
    }

    /// Adds a histogram that was read already.
    pub fn spread(&mut self, queue: Option<u16>, name: &str, histogram: stats::Histogram) {
        self.add(queue, name, Value::Histogram(histogram));
    }

    fn add(&mut self, queue: Option<u16>, name: &str, value: Value) {
        self.list.push(Sample { device: self.device.clone(), queue, name: name.to_owned(), value });
    }

    /// The part that begins with number `from`.
    pub fn page(self, from: u32) -> stats::Samples {
        let total = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        let skip = usize::try_from(from).unwrap_or(usize::MAX);
        let samples = self.list.into_iter().skip(skip).take(stats::SAMPLES_PER_REPLY).collect();
        stats::Samples { samples, total }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_value_is_counted_in_the_bucket_whose_bounds_hold_it(values: Vec<u64>) {
            let mut histogram = Histogram::default();
            for value in &values {
                histogram.record(*value);
                let index = bucket(*value);
                prop_assert!(stats::Histogram::bound(index).is_none_or(|bound| *value <= bound));
                prop_assert!(index == 0 || stats::Histogram::bound(index - 1).unwrap() < *value);
            }
            prop_assert_eq!(histogram.read().count(), values.len() as u64);
            prop_assert_eq!(histogram.read().sum, values.iter().fold(0u64, |sum, v| sum.saturating_add(*v)));
        }
    }

    #[test]
    fn pages_together_are_everything_in_order() {
        let list = || {
            let mut samples = Samples::default();
            for device in 0..130 {
                samples.of(&format!("d{device}")).counters(Some(1), &[("a", 1), ("b", device)]);
                samples.histogram(None, "c", &Histogram::default());
            }
            samples
        };
        let mut all = vec![];
        loop {
            let page = list().page(u32::try_from(all.len()).unwrap());
            assert_eq!(page.total, 390);
            let bytes = serde_json::to_vec(&page).unwrap().len();
            assert!(bytes < blixard_vmm_api::control::MESSAGE_BYTES_MAX);
            if page.samples.is_empty() {
                break;
            }
            all.extend(page.samples);
        }
        assert_eq!(all, list().list);
    }
}
