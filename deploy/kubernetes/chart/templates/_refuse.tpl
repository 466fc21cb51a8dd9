{{/*
Fails for values that would do nothing, or that contradict one another, and names them. What is said of pods of the other mode is
let be (image, settings, pod, ...), so that one file serves both, as those in ../examples do. Takes the root.
*/}}
{{- define "baton.refuse" -}}
{{- $values := .Values }}
{{- $single := eq $values.mode "singleNode" }}
{{- $idle := list }}
{{- if $single }}
  {{- range list "certManager" "autoscaling" "controllerScaling" }}
    {{- if (index $values .).enabled }}{{ $idle = append $idle (printf "%s.enabled" .) }}{{ end }}
  {{- end }}
  {{- range list "controller" "coordinator" "server" }}
    {{- if not (kindIs "invalid" (index $values .).replicas) }}{{ $idle = append $idle (printf "%s.replicas" .) }}{{ end }}
  {{- end }}
  {{- if $values.server.pools }}{{ $idle = append $idle "server.pools" }}{{ end }}
  {{- if $values.etcd.endpoints }}{{ $idle = append $idle "etcd.endpoints" }}{{ end }}
{{- else }}
  {{- range list "prefill" "decode" }}
    {{- if ne (int (get $values.singleNode .)) 1 }}{{ $idle = append $idle (printf "singleNode.%s" .) }}{{ end }}
  {{- end }}
  {{- if $values.singleNode.https }}{{ $idle = append $idle "singleNode.https" }}{{ end }}
{{- end }}
{{- range $way := list "ingress" "egress" }}
  {{- range $kind, $_ := get $values.networkPolicies $way }}
    {{- if ne $single (eq $kind "singleNode") }}{{ $idle = append $idle (printf "networkPolicies.%s.%s" $way $kind) }}{{ end }}
  {{- end }}
{{- end }}
{{- with $idle }}
  {{- fail (printf "%s: nothing comes of it where mode is %s: leave it out" (join ", " .) $values.mode) }}
{{- end }}

{{- range list "autoscaling" "controllerScaling" }}
  {{- $of := index $values . }}
  {{- if and $of.enabled (gt (int $of.min) (int $of.max)) }}
    {{- fail (printf "%s.min: %d is more than %s.max, %d" . (int $of.min) . (int $of.max)) }}
  {{- end }}
{{- end }}
{{- range $scaled, $by := dict "coordinator" "autoscaling" "server" "controllerScaling" }}
  {{- if and (index $values $by).enabled (not (kindIs "invalid" (index $values $scaled).replicas)) }}
    {{- fail (printf "%s.replicas: %s says how many there are: leave it out" $scaled $by) }}
  {{- end }}
{{- end }}
{{- if and $values.controllerScaling.enabled $values.server.pools }}
  {{- fail "controllerScaling: the controller scales one Deployment of servers: leave out server.pools" }}
{{- end }}
{{- if and $values.model.init (not $values.model.init.image) }}
  {{- fail "model.init: which container brings the model? name its image in model.init.image" }}
{{- end }}
{{- if and $values.model.init $values.model.volume }}
  {{- fail "model.volume: model.init brings the model to a volume of each pod: leave out one of them" }}
{{- end }}
{{- if and $values.clientCertificates.enabled $single (not $values.singleNode.https) }}
  {{- fail "clientCertificates: a single node has to serve HTTPS for them: name its Secret in singleNode.https" }}
{{- end }}
{{- end -}}
