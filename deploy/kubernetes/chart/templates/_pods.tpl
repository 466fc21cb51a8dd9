{{/* Deployments and StatefulSets, by the `values` of their kind of pod, beside `root` and `object`. */}}
{{- define "baton.pods" -}}
{{- $object := .object }}
{{- $all := .root.Values }}
{{- $template := $object.spec.template }}
{{- $pod := $template.spec }}
{{- $container := index $pod.containers 0 }}
{{- $name := $container.name }}
{{- $settings := .values.settings | default list }}

{{- $replicas := .values.replicas }}
{{- if eq $name "coordinator" }}
  {{- $fewest := $all.autoscaling.enabled | ternary $all.autoscaling.min $replicas }}
  {{- if and $fewest (ne (toString $fewest) (toString $object.spec.replicas)) }}
    {{- $settings = prepend $settings (printf "api_keys.coordinators=%v" $fewest) }}{{/* those of the values win */}}
  {{- end }}
{{- end }}
{{- if not (kindIs "invalid" $replicas) }}{{ $_ := set $object.spec "replicas" $replicas }}{{ end }}
{{- with .values.strategy }}{{ $_ := set $object.spec "strategy" . }}{{ end }}
{{- if or (and $all.autoscaling.enabled (eq $name "coordinator")) (and $all.controllerScaling.enabled (eq $name "server")) }}
  {{- $_ := unset $object.spec "replicas" }}
{{- end }}
{{- if and $all.controllerScaling.enabled (eq $name "controller") }}
  {{- $_ := set $pod "serviceAccountName" "baton-controller" }}
  {{- $_ := set $pod "automountServiceAccountToken" true }}
  {{- $group := printf "{deployment=\"baton-server\",min=%v,max=%v}" $all.controllerScaling.min $all.controllerScaling.max }}
  {{- $settings = concat (list "roles.policy=auto" (printf "kubernetes.groups.default=%s" $group)) $settings }}
{{- end }}
{{- range $settings }}
  {{- $_ := set $container "args" (append $container.args (eq $name "etcd" | ternary . (printf "--set=%s" .))) }}
{{- end }}

{{- $image := print $all.images.prefix $container.image ":" ($all.images.tag | default .root.Chart.AppVersion) }}
{{- $_ := set $container "image" (eq $name "etcd" | ternary ($all.etcd.image | default $image) $image) }}
{{- range $all.images.pullSecrets }}
  {{- $_ := set $pod "imagePullSecrets" (append ($pod.imagePullSecrets | default list) (dict "name" .)) }}
{{- end }}

{{- $volumes := list }}
{{- range $volume := $pod.volumes }}
  {{- if ne $volume.name "models" }}
    {{- $volumes = append $volumes $volume }}
  {{- else if $all.model.init }}
    {{- $volumes = append $volumes (dict "name" "models" "emptyDir" dict) }}
    {{- $mounts := list (dict "name" "models" "mountPath" "/models") }}
    {{- $init := dict "name" "model" "imagePullPolicy" "IfNotPresent" "securityContext" (deepCopy $container.securityContext) "volumeMounts" $mounts }}
    {{- include "baton.merge" (dict "into" $init "from" $all.model.init) }}
    {{- $_ := set $pod "initContainers" (list $init) }}
  {{- else if $all.model.volume }}
    {{- $volumes = append $volumes (merge (dict "name" "models") $all.model.volume) }}
  {{- else }}
    {{- $volumes = append $volumes $volume }}
  {{- end }}
{{- end }}
{{- $_ := set $pod "volumes" $volumes }}

{{- include "baton.merge" (dict "into" $container "from" .values.container) }}
{{- include "baton.merge" (dict "into" $pod "from" .values.pod) }}
{{- if has $name (list "coordinator" "baton") }}{{ include "baton.clients" (dict "values" $all "pod" $pod "name" $name) }}{{ end }}
{{- with include "baton.told" (dict "root" .root "pod" $pod) }}
  {{- $_ := set $template.metadata.annotations "checksum/config" (sha256sum .) }}
{{- end }}
{{- include "baton.merge" (dict "into" $template.metadata.annotations "from" .values.annotations) }}
{{- end -}}

{{/* By what clients are served, and whom they have to be known by. It comes last, so that no other value takes its place. */}}
{{- define "baton.clients" -}}
{{- $container := index .pod.containers 0 }}
{{- $prefix := eq .name "baton" | ternary "coordinator." "" }}
{{- $files := list }}
{{- with .values.clientCertificates }}
  {{- if .enabled }}
    {{- $items := list (dict "key" "ca.crt" "path" "ca.crt") }}
    {{- $secret := dict "secretName" .secret "defaultMode" 0440 "items" $items }}
    {{- $settings := list "client_ca_file=/etc/clients/ca.crt" }}
    {{- $files = append $files (dict "name" "clients-ca" "at" "/etc/clients" "secret" $secret "settings" $settings) }}
  {{- end }}
{{- end }}
{{- if and (eq .name "baton") .values.singleNode.https }}
  {{- $settings := list "cert_file=/etc/https/tls.crt" "key_file=/etc/https/tls.key" }}
  {{- $secret := dict "secretName" .values.singleNode.https "defaultMode" 0440 }}
  {{- $files = append $files (dict "name" "https" "at" "/etc/https" "secret" $secret "settings" $settings) }}
{{- end }}
{{- range $files }}
  {{- $volumes := list (dict "name" .name "secret" .secret) }}
  {{- include "baton.merge" (dict "into" $.pod "from" (dict "volumes" $volumes)) }}
  {{- $mounts := list (dict "name" .name "mountPath" .at "readOnly" true) }}
  {{- include "baton.merge" (dict "into" $container "from" (dict "volumeMounts" $mounts)) }}
  {{- range .settings }}
    {{- $_ := set $container "args" (append ($container.args | default list) (printf "--set=%shttps.%s" $prefix .)) }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* What a `pod` is told by our ConfigMaps, nothing if it asks none: when that changes, there are new pods. */}}
{{- define "baton.told" -}}
{{- $maps := fromJson (include "baton.configMaps" .root) }}
{{- $told := dict }}
{{- range $container := concat .pod.containers (.pod.initContainers | default list) }}
  {{- range $container.env }}
    {{- with (.valueFrom | default dict).configMapKeyRef }}
      {{- if hasKey $maps .name }}{{ $_ := set $told (printf "%s/%s" .name .key) (get (get $maps .name) .key) }}{{ end }}
    {{- end }}
  {{- end }}
{{- end }}
{{- range $volume := .pod.volumes }}
  {{- range ($volume.projected | default dict).sources }}
    {{- with .configMap }}{{ if hasKey $maps .name }}{{ $_ := set $told .name (get $maps .name) }}{{ end }}{{ end }}
  {{- end }}
{{- end }}
{{- if $told }}{{ toJson $told }}{{ end }}
{{- end -}}

{{/*
Puts the dict `from` into the dict `into`, in place. Of lists whose entries Kubernetes knows by a name, an entry of `from` takes
the place of the one of its name, or comes last; any other list takes the place of the whole.
*/}}
{{- define "baton.merge" -}}
{{- $names := dict "volumeMounts" "mountPath" "ports" "containerPort" "tolerations" "key" "topologySpreadConstraints" "topologyKey" }}
{{- range list "containers" "initContainers" "env" "volumes" "imagePullSecrets" }}{{ $_ := set $names . "name" }}{{ end }}
{{- $into := .into }}
{{- range $key, $new := deepCopy (.from | default dict) }}
  {{- $old := get $into $key }}
  {{- $name := get $names $key }}
  {{- if and (kindIs "map" $old) (kindIs "map" $new) }}
    {{- include "baton.merge" (dict "into" $old "from" $new) }}
  {{- else if and $name (kindIs "slice" $old) (kindIs "slice" $new) }}
    {{- $entries := list }}
    {{- $known := list }}
    {{- range $one := $old }}
      {{- $known = append $known (toString (get $one $name)) }}
      {{- $same := list }}
      {{- range $new }}{{ if eq (toString (get . $name)) (last $known) }}{{ $same = append $same . }}{{ end }}{{ end }}
      {{- $entries = concat $entries ($same | default (list $one)) }}
    {{- end }}
    {{- range $new }}{{ if not (has (toString (get . $name)) $known) }}{{ $entries = append $entries . }}{{ end }}{{ end }}
    {{- $_ := set $into $key $entries }}
  {{- else }}
    {{- $_ := set $into $key $new }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* One of server.pools, made of what is for all servers: its `pool`, the name, and its `values`. */}}
{{- define "baton.pool" -}}
{{- $object := .object }}
{{- $label := dict "baton/pool" .pool }}
{{- $_ := set $object.metadata "name" (printf "%s-%s" $object.metadata.name .pool) }}
{{- $_ := mergeOverwrite $object.metadata.labels $label }}
{{- $_ := mergeOverwrite $object.spec.selector.matchLabels $label }}
{{- if eq $object.kind "Deployment" }}
  {{- $_ := mergeOverwrite $object.spec.template.metadata.labels $label }}
  {{- range $object.spec.template.spec.topologySpreadConstraints }}
    {{- $_ := mergeOverwrite .labelSelector.matchLabels $label }}
  {{- end }}
  {{- $container := index $object.spec.template.spec.containers 0 }}
  {{- $role := dict "name" "BATON_SERVER__LABELS__ROLE" "value" .values.role }}
  {{- $_ := set $container "env" (append $container.env $role) }}
{{- end }}
{{- end -}}
