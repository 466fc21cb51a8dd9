//! The models that this coordinator serves, found by what requests say in `model`.
//!
//! Made once, at start, by [`crate::build`]; opened by [`crate::life`], asked by [`crate::serve`] and [`crate::http`]. A [`Model`] has what is its
//! own: its text side, the line that its requests wait in, what is counted of it. What all models share (the room for
//! bodies, cores to work on them, the board of instances) is elsewhere.

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use baton_checkpoint::ModelRoot;
use baton_proto::{ApiError, ErrorCode};
use baton_schedule::queue::Rank;
use futures::future::try_join_all;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    CoordinatorError,
    admit::Line,
    config::{LimitsConfig, ModelConfig},
    metrics::{Metrics, ModelMetrics},
    prepare::Served,
    retry_budget::RetryBudget,
    text::TextCache,
};

/// One of them.
pub struct Model {
    pub served: Arc<Served>,
    pub line: Line,
    pub counts: Arc<ModelMetrics>,
    /// For requests that are placed again.
    pub retry_budget: Mutex<RetryBudget>,
}

/// All of them.
pub struct Models {
    /// In the order of the configuration.
    all: Vec<Arc<Model>>,
    by_name: HashMap<Arc<str>, Arc<Model>>,
}

/// Opens the models of a configuration side by side: most of a start is spent in reading tokenizers. Pieces of long prompts
/// are kept in `cache`. All files of theirs have to lie under `root`; an empty path = anywhere.
pub async fn open(
    configs: &[ModelConfig],
    root: &Path,
    cache: &Arc<TextCache>,
) -> Result<Vec<Served>, CoordinatorError> {
    let root = ModelRoot::at(root).map_err(|source| CoordinatorError::ModelRoot(Box::new(source)))?;
    let open = |(index, config): (usize, &ModelConfig)| {
        let (config, root, cache) = (config.clone(), root.clone(), cache.clone());
        let opening = tokio::task::spawn_blocking(move || Served::open(&config, &root, &cache));
        async move {
            let opened = opening.await.map_err(|source| CoordinatorError::Opening { index, source })?;
            opened.map_err(|source| CoordinatorError::Model { index, source })
        }
    };
    try_join_all(configs.iter().enumerate().map(open)).await
}

impl Models {
    /// A name that two have is refused.
    pub fn new(
        served: Vec<Served>,
        limits: &LimitsConfig,
        metrics: &Metrics,
    ) -> Result<Self, CoordinatorError> {
        let mut models = Self { all: Vec::new(), by_name: HashMap::new() };
        for (index, served) in served.into_iter().enumerate() {
            let counts = Arc::new(metrics.of_model(served.name.clone()));
            let served = Arc::new(served);
            let line = Line::new(limits, served.clone(), counts.clone());
            let retry_budget = Mutex::new(RetryBudget::new(Instant::now()));
            let model = Arc::new(Model { served, line, counts, retry_budget });
            models.all.push(model.clone());
            for name in model.served.names() {
                let holder = models.by_name.insert(name.clone(), model.clone());
                let by =
                    holder.and_then(|holder| models.all.iter().position(|one| Arc::ptr_eq(one, &holder)));
                if let Some(by) = by {
                    return Err(CoordinatorError::NameTaken { index, name: name.to_string(), by });
                }
            }
        }
        Ok(models)
    }

    /// All, in the order of the configuration.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<Model>> {
        self.all.iter()
    }

    /// Whether anybody waits, for whichever model, who gives way to one of this rank.
    pub fn have_behind(&self, rank: &Rank) -> bool {
        self.all.iter().any(|model| model.line.has_behind(rank))
    }

    /// How long it is predicted to take until the first of the lines that requests wait in has been served.
    pub fn drain(&self) -> Option<Duration> {
        self.all.iter().filter_map(|model| model.line.drain()).filter(|wait| !wait.is_zero()).min()
    }

    /// The one that every request asks for, if there is but one.
    pub fn only(&self) -> Option<&Arc<Model>> {
        self.all.first().filter(|_| self.all.len() == 1)
    }

    /// The one that a request names; the only one if it names none.
    pub fn asked(&self, name: Option<&str>) -> Result<&Arc<Model>, ApiError> {
        let (code, what) = match name {
            Some(name) => match self.by_name.get(name) {
                Some(model) => return Ok(model),
                None => (ErrorCode::ModelNotFound, format!("there is no model `{name}`")),
            },
            None => match self.only() {
                Some(model) => return Ok(model),
                None => (ErrorCode::InvalidArgument, "must be given".to_owned()),
            },
        };
        let names: Vec<String> =
            self.all.iter().flat_map(|model| model.served.names()).map(|name| format!("`{name}`")).collect();
        let verb = if names.len() == 1 { "is" } else { "are" };
        Err(ApiError::new(code, format!("model: {what}; there {verb} {}", names.join(", "))).param("model"))
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::prepare::tests::served;

    fn models(all: &[(&str, &[&str])]) -> Result<Models, CoordinatorError> {
        let served = all.iter().map(|(name, aliases)| Served {
            name: (*name).into(),
            aliases: aliases.iter().map(|&alias| alias.into()).collect(),
            ..served()
        });
        let metrics = Metrics::register(&mut Registry::default());
        Models::new(served.collect(), &LimitsConfig::default(), &metrics)
    }

    #[test]
    fn a_request_finds_its_model_by_each_of_its_names() {
        let models = models(&[("a", &["x", "y"]), ("b", &[])]).expect("names differ");
        for (asked, found) in [("a", "a"), ("x", "a"), ("y", "a"), ("b", "b")] {
            assert_eq!(&*models.asked(Some(asked)).expect(asked).served.name, found);
        }
        let told = |asked| {
            let error = models.asked(asked).err().expect("nobody has that name");
            assert_eq!(error.param.as_deref(), Some("model"));
            (error.code, error.message)
        };
        let (code, message) = told(Some("c"));
        assert_eq!(code, ErrorCode::ModelNotFound);
        assert_eq!(message, "model: there is no model `c`; there are `a`, `x`, `y`, `b`");
        let (code, message) = told(None);
        assert_eq!(code, ErrorCode::InvalidArgument);
        assert_eq!(message, "model: must be given; there are `a`, `x`, `y`, `b`");
    }

    #[test]
    fn a_request_that_names_none_asks_for_the_only_one() {
        let models = models(&[("a", &["x"])]).expect("names differ");
        assert_eq!(&*models.asked(None).expect("there is one").served.name, "a");
    }

    #[test]
    fn a_name_that_two_models_have_is_refused_with_its_field() {
        type Names<'a> = &'a [(&'a str, &'a [&'a str])];
        let cases: [(Names<'_>, &str); 4] = [
            (&[("a", &[]), ("b", &[]), ("a", &[])], "models[2].names: `a` is a name of models[0], too"),
            (&[("a", &["x"]), ("b", &["x"])], "models[1].names: `x` is a name of models[0], too"),
            (&[("a", &["b"]), ("b", &[])], "models[1].names: `b` is a name of models[0], too"),
            (&[("a", &["x", "x"])], "models[0].names: `x` is a name of models[0], too"),
        ];
        for (names, said) in cases {
            let error = models(names).err().unwrap_or_else(|| panic!("{names:?} were taken"));
            assert!(error.to_string().starts_with(said), "{error}");
        }
    }
}
