//! The parts of a span's time, each a span of its own, told once it is over.
//!
//! Parts that follow on from one another share a boundary, so that they add up to the whole to the nanosecond: all of a
//! span's are laid out from one reading of the clock.

use std::{
    fmt,
    sync::OnceLock,
    time::{Instant, SystemTime},
};

use opentelemetry::{
    Context,
    trace::{Span as _, TraceContextExt, Tracer},
};
use opentelemetry_sdk::trace::SdkTracer;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// What parts are told by; none while traces are not exported.
pub(super) static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// See the module. Costs two words where the span is not sampled.
pub struct Stages {
    since: Instant,
    told: Option<Box<Told>>,
}

/// Where parts are told.
struct Told {
    tracer: SdkTracer,
    of: Context,
    /// The same moment by both clocks.
    began: (Instant, SystemTime),
}

impl Stages {
    /// The first part begins at `began`, which is not long ago.
    pub fn begin(span: &Span, began: Instant) -> Self {
        Self::told_by(TRACER.get(), span, began)
    }

    fn told_by(tracer: Option<&SdkTracer>, span: &Span, began: Instant) -> Self {
        let told = tracer.and_then(|tracer| {
            let (tracer, of) = (tracer.clone(), span.context());
            let began = (began, SystemTime::now() - began.elapsed());
            of.span().span_context().is_sampled().then(|| Box::new(Told { tracer, of, began }))
        });
        Self { since: began, told }
    }

    /// A part ends here, and the next begins.
    pub fn passed(&mut self, part: &'static str, at: Instant) {
        let from = std::mem::replace(&mut self.since, at);
        self.part(part, from, at);
    }

    /// The same, now.
    pub fn passed_now(&mut self, part: &'static str) {
        if self.told.is_some() {
            self.passed(part, Instant::now());
        }
    }

    /// A part beside those that follow on from one another.
    pub fn part(&self, part: &'static str, from: Instant, to: Instant) {
        if let Some(told) = &self.told {
            let span = told.tracer.span_builder(part).with_start_time(told.at(from));
            told.tracer.build_with_context(span, &told.of).end_with_timestamp(told.at(to));
        }
    }
}

impl Told {
    fn at(&self, instant: Instant) -> SystemTime {
        let (by_this, by_all) = self.began;
        match instant.checked_duration_since(by_this) {
            Some(later) => by_all + later,
            None => by_all - by_this.duration_since(instant),
        }
    }
}

impl fmt::Debug for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stages").field("told", &self.told.is_some()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn parts_add_up_to_the_whole() {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let tracer = provider.tracer("test");
        let layer = tracing_opentelemetry::layer().with_tracer(tracer.clone());
        let began = Instant::now();
        let after = |millis| began + Duration::from_millis(millis);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let span = tracing::info_span!("whole");
            let mut stages = Stages::told_by(Some(&tracer), &span, began);
            stages.passed("first", after(7));
            stages.part("beside", after(3), after(9));
            stages.passed("second", after(20));
        });
        let spans = exporter.get_finished_spans().expect("are there");
        let of = |name: &str| spans.iter().find(|span| span.name == name).expect(name);
        let took = |name| of(name).end_time.duration_since(of(name).start_time).expect("goes on").as_millis();
        assert_eq!((took("first"), took("second"), took("beside")), (7, 13, 6));
        assert_eq!(of("first").end_time, of("second").start_time);
        let whole = of("whole").span_context.span_id();
        assert!(["first", "second", "beside"].iter().all(|name| of(name).parent_span_id == whole));
    }

    #[test]
    fn without_traces_nothing_is_told() {
        let mut stages = Stages::begin(&Span::none(), Instant::now());
        stages.passed_now("part");
        assert!(stages.told.is_none());
    }
}
