//! Chat templates: the model's Jinja source, rendered as Hugging Face's `apply_chat_template` renders it.

mod sums;

use std::{fmt, sync::Arc, time::SystemTime};

use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig, value::Serde};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::TextError;

/// Tells the time to templates that write the date. UTC.
pub type Clock = fn() -> SystemTime;

/// What a request tells the model's template, as in `{"enable_thinking": false}`.
pub type Variables = serde_json::Map<String, serde_json::Value>;

/// One message of a chat, as templates know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage<'a> {
    /// `system`, `user` or `assistant`, if it is a client's.
    pub role: &'a str,
    /// Shared with the template, which may be told of a megabyte.
    pub content: Arc<str>,
}

/// A model's chat template, ready to render.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

const NAME: &str = "chat";
/// Steps that a rendering may take, of which each is worth 64 bytes of what is made on the way, too (minijinja's fuel): so many
/// whatever is said, and more for each byte and each message of it. Published templates take a tenth of that at most, and one of
/// somebody's making can neither hold a thread for long nor take much memory.
const FUEL_LEAST: u64 = 50_000;
const FUEL_OF_BYTE: u64 = 2;
const FUEL_OF_MESSAGE: u64 = 1_000;
/// And no more than this, however much is said: by minijinja's account 256 MB. Ten thousand short messages take Qwen3's template
/// an eighth of it, and so do eight MiB.
const FUEL_MOST: u64 = 4_000_000;
/// Marks errors that the template itself raised.
const RAISED: &str = "raised by the template: ";

impl ChatTemplate {
    /// Compiles the template; the error says what is wrong with it.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>, clock: Clock) -> Result<Self, Error> {
        Self::compile(sums::apart(&without_generation_tags(source), &syntax()?), (bos, eos), clock)
    }

    fn compile(
        source: String,
        (bos, eos): (Option<&str>, Option<&str>),
        clock: Clock,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax()?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |reason: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{reason}")))
        });
        environment.add_function("strftime_now", move |format: String| strftime(&format, clock()));
        sums::make_ready(&mut environment);
        environment.add_template_owned(NAME, source)?;
        Ok(Self { environment, bos_token: bos.map(str::to_owned), eos_token: eos.map(str::to_owned) })
    }

    /// The prompt for these messages, ready for the assistant's answer. `variables` are told to the template beside what
    /// every template is told, which they cannot change.
    pub fn render(&self, messages: &[ChatMessage<'_>], variables: &Variables) -> Result<String, TextError> {
        self.render_with(fuel(messages), messages, variables)
    }

    fn render_with(
        &self,
        fuel: u64,
        messages: &[ChatMessage<'_>],
        variables: &Variables,
    ) -> Result<String, TextError> {
        // All of it is shared with the clone, but the fuel.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let template = environment.get_template(NAME).map_err(TextError::Render)?;
        let message =
            |message: &ChatMessage<'_>| context! { role => message.role, content => message.content.clone() };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        // A token that the model does not have is undefined, which prints as nothing; `none` would print as a word.
        let token = |token: &Option<String>| token.as_deref().map_or(Value::UNDEFINED, Value::from);
        let result = template.render(context! {
            messages,
            add_generation_prompt => true,
            bos_token => token(&self.bos_token),
            eos_token => token(&self.eos_token),
            ..Value::from(Serde(variables))
        });
        result.map_err(|error| match error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
            Some(reason) => TextError::Refused { reason: reason.to_owned() },
            None => TextError::Render(error),
        })
    }
}

/// As in Hugging Face's own environment.
fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// That a template says the same with its sums taken apart, but for those that run out of fuel.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn says_what_is_written(source: &str, messages: &[ChatMessage<'_>]) {
    let (bos, eos, clock): (_, _, Clock) = (Some("<s>"), Some("</s>"), || SystemTime::UNIX_EPOCH);
    let ours = ChatTemplate::new(source, bos, eos, clock);
    let written = ChatTemplate::compile(without_generation_tags(source), (bos, eos), clock);
    assert_eq!(ours.is_ok(), written.is_ok(), "{ours:?} for {written:?}");
    let (Ok(ours), Ok(written)) = (ours, written) else { return };
    let rendered = [ours, written].map(|template| template.render(messages, &Variables::new()));
    let without_fuel = |rendered: &Result<String, TextError>| matches!(rendered, Err(TextError::Render(error)) if error.kind() == ErrorKind::OutOfFuel);
    if !rendered.iter().any(without_fuel) {
        let [ours, written] = rendered;
        assert!(ours.as_ref().ok() == written.as_ref().ok(), "{ours:?} for {written:?}");
    }
}

fn fuel(messages: &[ChatMessage<'_>]) -> u64 {
    let said: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
    (FUEL_LEAST + FUEL_OF_BYTE * said as u64 + FUEL_OF_MESSAGE * messages.len() as u64).min(FUEL_MOST)
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("bos_token", &self.bos_token).finish_non_exhaustive()
    }
}

/// Training marks the assistant's words with `{% generation %}` blocks, an extension of Hugging Face's that changes
/// nothing about the text; here they become blocks that are always taken.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}") else { break };
        let (before, tag) = (&rest[..open], &rest[open..open + close + 2]);
        let word = tag.trim_start_matches(['{', '%', '-', '+']).trim_end_matches(['%', '}', '-', '+']).trim();
        result.push_str(before);
        match word {
            "generation" => result.push_str(&tag.replace(word, "if true")),
            "endgeneration" => result.push_str(&tag.replace(word, "endif")),
            _ => result.push_str(tag),
        }
        rest = &rest[open + close + 2..];
    }
    result.push_str(rest);
    result
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Python's `strftime` in UTC, the codes that templates use; others stay as they are.
fn strftime(format: &str, now: SystemTime) -> String {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days % 7) as usize];
    let mut result = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            result.push(character);
            continue;
        }
        let code: String = match characters.next() {
            Some('-') => format!("-{}", characters.next().unwrap_or_default()),
            Some(code) => code.to_string(),
            None => String::new(),
        };
        let text = match code.as_str() {
            "Y" => year.to_string(),
            "y" => format!("{:02}", year % 100),
            "m" => format!("{month:02}"),
            "-m" => month.to_string(),
            "B" => month_name.to_owned(),
            "b" => month_name[..3].to_owned(),
            "d" => format!("{day:02}"),
            "-d" => day.to_string(),
            "A" => day_name.to_owned(),
            "a" => day_name[..3].to_owned(),
            "H" => format!("{hour:02}"),
            "M" => format!("{minute:02}"),
            "S" => format!("{second:02}"),
            "%" => "%".to_owned(),
            other => format!("%{other}"),
        };
        result.push_str(&text);
    }
    result
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01. Eras of 400 years are counted from March, so
/// that the leap day comes last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153; // March is 0
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// 2026-11-23 13:05:09, a Monday.
    fn clock() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_439_109)
    }

    fn render(source: &str, messages: &[ChatMessage<'_>]) -> Result<String, TextError> {
        ChatTemplate::new(source, Some("<s>"), None, clock)
            .expect("the template compiles")
            .render(messages, &Variables::new())
    }

    fn hello() -> ChatMessage<'static> {
        ChatMessage { role: "user", content: " Hi <b> ".into() }
    }

    #[test]
    fn python_methods_slices_and_loop_controls_work() {
        let source =
            "{{ bos_token }}{% for m in messages[0:] %}{% if m['role'] == 'tool' %}{% continue %}{% endif %}
            {{- m.role.upper() }}: {{ m['content'].strip() }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
A:{% endif %}";
        assert_eq!(render(source, &[hello()]).expect("renders"), "<s>USER: Hi <b>\nA:");
    }

    #[test]
    fn the_templates_own_refusal_reaches_the_client() {
        let source = "{{ raise_exception('roles must alternate') }}";
        assert!(
            matches!(render(source, &[hello()]), Err(TextError::Refused { reason }) if reason == "roles must alternate")
        );
        assert!(matches!(render("{{ messages[0].a.b.c }}", &[hello()]), Err(TextError::Render { .. })));
        assert!(ChatTemplate::new("{% for %}", None, None, clock).is_err());
    }

    #[test]
    fn generation_blocks_are_plain_text() {
        let source = "a{%- generation -%} b {%- endgeneration %}c{% if x %}{%endif%}";
        assert_eq!(render(source, &[]).expect("renders"), "abc");
    }

    #[test]
    fn endless_templates_end() {
        let source = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(source, &[]), Err(TextError::Render { .. })));
        let growing =
            "{% set x = namespace(s='a') %}{% for a in range(64) %}{% set x.s = x.s ~ x.s %}{% endfor %}";
        assert!(matches!(render(growing, &[]), Err(TextError::Render { .. })));
    }

    /// As the models' publishers have them.
    fn published(name: &str) -> ChatTemplate {
        ChatTemplate::new(&source_of(name), Some("<s>"), None, clock).expect("compiles")
    }

    fn source_of(name: &str) -> String {
        let folder = std::env::var_os("BATON_TEST_TOKENIZERS")
            .expect("BATON_TEST_TOKENIZERS must be a folder of tokenizers; `deploy/run test` sets it");
        let path = std::path::Path::new(&folder).join(name).join("tokenizer_config.json");
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        config["chat_template"].as_str().expect("a template").to_owned()
    }

    #[test]
    fn published_templates_say_what_is_written_in_them() {
        let roles = ["system", "user", "assistant", "user", "assistant"];
        for name in ["llama3", "qwen3", "deepseek_v3"] {
            let source = source_of(name);
            let has_sums = sums::apart(&source, &syntax().expect("good")) != source;
            assert_eq!(has_sums, name != "llama3", "{name}");
            for content in ["", " Hi <b>\n", "a</think>b {{ 'c' + d }} é"] {
                let messages = roles.map(|role| ChatMessage { role, content: content.into() });
                (0..messages.len()).for_each(|from| says_what_is_written(&source, &messages[from..]));
            }
        }
    }

    #[test]
    fn a_request_can_tell_the_template_more_and_not_otherwise() {
        let qwen3 = published("qwen3");
        let rendered = |variables: serde_json::Value| {
            qwen3.render(&[hello()], variables.as_object().expect("an object")).expect("renders")
        };
        let plain = "<|im_start|>user\n Hi <b> <|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(rendered(serde_json::json!({})), plain);
        assert_eq!(rendered(serde_json::json!({"enable_thinking": true})), plain);
        let without = format!("{plain}<think>\n\n</think>\n\n");
        assert_eq!(rendered(serde_json::json!({"enable_thinking": false})), without);
        let otherwise = serde_json::json!({"messages": [], "add_generation_prompt": false});
        assert_eq!(rendered(otherwise), plain);
    }

    #[test]
    fn published_templates_take_a_part_of_what_they_may() {
        let [short, long]: [Arc<str>; 2] = ["Hi!".into(), "word ".repeat(20_000).into()];
        for name in ["llama3", "qwen3", "deepseek_v3"] {
            let template = published(name);
            for (content, count) in
                [(&short, 1), (&short, 500), (&long, 1), (&long, 4), (&short, 10_000), (&long, 80)]
            {
                let role = |at: usize| ["user", "assistant"][at % 2];
                let of = |at| ChatMessage { role: role(at), content: content.clone() };
                let messages: Vec<_> = (0..count).map(of).collect();
                let may = fuel(&messages);
                let part = if may < FUEL_MOST { 10 } else { 4 };
                let rendered = template.render_with(may / part, &messages, &Variables::new());
                assert!(rendered.is_ok(), "{name}, {count} of {} bytes: {rendered:?}", content.len());
            }
        }
    }

    #[test]
    fn dates_are_pythons() {
        assert_eq!(
            strftime("%d %b %Y, %A %a %B %-m %-d %H:%M:%S %y %% %Q", clock()),
            "23 Nov 2026, Monday Mon November 11 23 13:05:09 26 % %Q"
        );
        let at = |days: u64| civil(days);
        assert_eq!(
            (at(0), at(59), at(789), at(11_016)),
            ((1970, 1, 1), (1970, 3, 1), (1972, 2, 29), (2000, 2, 29))
        );
        assert_eq!(at(20_819), (2027, 1, 1));
    }
}
