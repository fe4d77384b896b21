//! Counting: histograms owned by one thread, and the list in which everything that is counted is handed out.

use blixard_vmm_api::control::MESSAGE_BYTES_MAX;
use blixard_vmm_api::stats::{self, BUCKETS_MAX, Sample, Value};

/// Most bytes of the samples of one answer, which has to fit a message.
const PAGE_BYTES: usize = MESSAGE_BYTES_MAX - 1024;
/// Most digits of a number, and the comma behind it.
const NUMBER: usize = 21;
/// Bytes of a sample besides its names and numbers.
const FRAME: usize = 100;

/// Most bytes that a sample takes in a message. Names are short and of plain characters.
fn bytes(sample: &Sample) -> usize {
    let numbers = match &sample.value {
        Value::Count(_) => 2,
        Value::Histogram(histogram) => 2 + histogram.buckets.len(),
    };
    FRAME + sample.device.len() + sample.name.len() + NUMBER * numbers
}

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
        let mut room = PAGE_BYTES;
        let fits = |sample: &Sample| {
            let size = bytes(sample);
            let fits = size <= room;
            room = room.saturating_sub(size);
            fits
        };
        let rest = self.list.into_iter().skip(skip).take(stats::SAMPLES_PER_REPLY);
        stats::Samples { samples: rest.take_while(fits).collect(), total }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blixard_vmm_api::control::{FromVmm, Reply};
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

    /// All samples, page by page; each page fits a message.
    fn all_pages(list: impl Fn() -> Samples) -> Vec<Sample> {
        let mut all = vec![];
        loop {
            let page = list().page(u32::try_from(all.len()).unwrap());
            assert_eq!(page.total as usize, list().list.len());
            let reply = FromVmm::Reply(Reply::Metrics(page.clone()));
            assert!(serde_json::to_vec(&reply).unwrap().len() <= MESSAGE_BYTES_MAX);
            if page.samples.is_empty() {
                return all;
            }
            all.extend(page.samples);
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
        assert_eq!(all_pages(list), list().list);
    }

    #[test]
    fn histograms_of_the_largest_numbers_fit_too() {
        let list = || {
            let mut samples = Samples::default();
            for device in 0..31 {
                samples.of(&format!("blk.{}{device}", "x".repeat(62)));
                let full = Histogram { sum: u64::MAX, buckets: [u64::MAX; BUCKETS_MAX] };
                for name in ["read_us", "write_us", "flush_us", "discard_us", "write_zeroes_us"] {
                    samples.histogram(Some(u16::MAX), name, &full);
                }
            }
            samples
        };
        assert_eq!(all_pages(list), list().list);
    }
}
